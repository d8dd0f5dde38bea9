"""Cookies for the page: `<video>`, `<img>` and `EventSource` cannot send an `Authorization`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sora_engine.serve.access import Sessions, session_token, set_cookie
from sora_engine.serve.failures import ApiError
from sora_engine.serve.keys import Keys

router = APIRouter(tags=["session"])


class SessionKey(BaseModel):
    """An API key."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(max_length=1000)


@router.post("/session", operation_id="begin_session", status_code=204)
async def begin_session(body: SessionKey, request: Request) -> Response:
    """Exchange a key for a cookie that scripts cannot read and other sites' pages do not send."""
    keys: Keys | None = request.app.state.keys
    sessions: Sessions = request.app.state.sessions
    answer = Response(status_code=204)
    if keys is None:  # nobody needs one
        return answer
    key = keys.key_for(body.key)
    if key is None:
        raise ApiError(401, "invalid_api_key", "the key is not known")
    cookie = set_cookie(sessions.begin(key), secure=request.url.scheme == "https")
    answer.headers["set-cookie"] = cookie
    return answer


@router.delete("/session", operation_id="end_session", status_code=204)
async def end_session(request: Request) -> Response:
    """Forget the cookie."""
    sessions: Sessions = request.app.state.sessions
    token = session_token(request.scope)
    if token is not None:
        sessions.end(token)
    answer = Response(status_code=204)
    answer.headers["set-cookie"] = set_cookie("", secure=False, max_age_s=0)
    return answer
