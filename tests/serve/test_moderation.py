"""The examples of hooks: what they refuse, what a client is told, and what no log says."""

from __future__ import annotations

import http.server
import importlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sora_engine.serve.settings import settings_from
from tests.serve.serving import SMALL, Service, served

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    sys.modules.pop("moderation", None)


def hooks_of(function: str):
    return settings_from({"hooks": f"moderation:{function}"}, {}, {}).hooks


class Classifier(http.server.BaseHTTPRequestHandler):
    """Flags what says so; answers nonsense once it is broken."""

    asked: list[str] = []  # noqa: RUF012
    broken = False

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        self.asked.append(text)
        told = {"flagged": "bad" in text, "categories": {"violence": "bad" in text, "other": False}}
        body = b"<html>" if self.broken else json.dumps({"results": [told]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def classifier(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Classifier]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Classifier)
    monkeypatch.setenv("SORA_CLASSIFIER", f"http://127.0.0.1:{server.server_port}/v1/moderations")
    monkeypatch.setattr(Classifier, "asked", [])
    monkeypatch.setattr(Classifier, "broken", False)
    threading.Thread(target=server.serve_forever).start()
    yield Classifier
    server.shutdown()
    server.server_close()


def asked(service: Service, prompt: str, **fields: object) -> tuple[int, dict[str, object]]:
    answer = service.http.post("/v1/videos", json={**SMALL, "prompt": prompt, **fields})
    return answer.status_code, answer.json().get("error", {})


def test_a_word_list_refuses_whole_words_in_any_form(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SORA_WORDS", str(EXAMPLES / "words.txt"))
    caplog.set_level(logging.DEBUG)
    with served(tmp_path / "data", hooks=hooks_of("words")) as service:
        for prompt in (
            "a forbidden zephyr",
            "FORBIDDEN zephyr",
            "zephyr, secret\n  weapon!",
            "a ｆｏｒｂｉｄｄｅｎ zephyr",
        ):
            status, error = asked(service, prompt)
            assert (status, error["code"]) == (400, "refused")
            assert error["type"] == "invalid_request_error"
            assert "zephyr" not in error["message"]
        shots = [{"prompt": "a circle", "num_frames": 2}, {"prompt": "forbidden", "num_frames": 3}]
        assert asked(service, "a", shots=shots)[1]["code"] == "refused"
        assert asked(service, "unforbidden forbiddenness of a secret, a weapon")[0] == 200
        assert asked(service, "a red circle")[0] == 200
        assert len(service.http.get("/v1/videos").json()["data"]) == 2
        text = service.http.get("/metrics").text
        assert 'sora_queue_refusals_total{reason="refused"} 5.0' in text
        service.idle()
    assert "a hook refused a request" in caplog.messages
    ours = [record for record in caplog.records if record.name.startswith("sora_engine")]
    assert not [record for record in ours if "zephyr" in record.getMessage()]


def test_a_classifier_is_asked_once_for_each_text(tmp_path, classifier, caplog):
    caplog.set_level(logging.DEBUG)
    with served(tmp_path / "data", hooks=hooks_of("classifier")) as service:
        status, error = asked(service, "a bad zephyr")
        assert (status, error["code"]) == (400, "refused")
        assert error["message"] == "the prompt is refused: violence"
        video = service.create(prompt="a good zephyr")
        assert service.ended(video["id"])["status"] == "completed"
        assert classifier.asked == ["a bad zephyr", "a good zephyr"]

        classifier.broken = True
        answer = service.http.post("/v1/videos", json={**SMALL, "prompt": "another"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "moderation_unavailable"
        assert answer.headers["retry-after"] == "5"
        classifier.broken = False
        assert asked(service, "another")[0] == 200  # no verdict was kept
        service.idle()
    ours = [record for record in caplog.records if record.name.startswith("sora_engine")]
    assert not [record for record in ours if "zephyr" in record.getMessage()]


def test_hooks_that_cannot_be_made_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("SORA_WORDS", raising=False)
    with pytest.raises(ValueError, match=r"hooks: moderation:words failed: KeyError: 'SORA_WORDS'"):
        hooks_of("words")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    monkeypatch.setenv("SORA_WORDS", str(empty))
    with pytest.raises(ValueError, match="lists no words"):
        hooks_of("words")
    with pytest.raises(ValueError, match="hooks: moderation:nothing cannot be imported"):
        hooks_of("nothing")
    assert importlib.import_module("moderation").plain("A  B") == "a b"
