"""What the page needs of the server, without a browser: its switch, turns, and what is offered."""

from __future__ import annotations

from pathlib import Path

from tests.serve.serving import served


def test_without_the_page_there_is_no_file_of_it(tmp_path: Path) -> None:
    with served(tmp_path, page=False) as service:
        for path in ("/", "/page/app.js", "/favicon.ico"):
            assert service.http.get(path).status_code == 404
        assert service.http.get("/v1/models").status_code == 200


def test_a_job_that_waits_is_put_before_another(tmp_path: Path) -> None:
    with served(tmp_path, max_running=1, max_priority=2) as service:

        def put(name: str, priority: object) -> object:
            answer = service.http.post(f"/v1/videos/{name}/priority", json={"priority": priority})
            return answer.json() if answer.status_code == 200 else answer.status_code

        first = service.create(num_inference_steps=200)["id"]
        second, third = (service.create(prompt=f"a {n}")["id"] for n in ("star", "square"))
        places = [service.http.get(f"/v1/videos/{n}").json() for n in (second, third)]
        assert places[0]["queue_position"] < places[1]["queue_position"]
        told = put(third, 2)
        assert isinstance(told, dict)
        assert told["priority"] == 2
        places = [service.http.get(f"/v1/videos/{n}").json() for n in (second, third)]
        assert places[0]["queue_position"] > places[1]["queue_position"]
        assert put(third, 3) == 400
        assert put(third, "high") == 400
        assert put("video_of_nobody", 1) == 404
        begun = put(first, 1)
        assert isinstance(begun, dict)
        assert begun["priority"] == 0
        service.http.post(f"/v1/videos/{first}/cancel")
        ends = [service.ended(name)["completed_at"] for name in (third, second)]
        assert ends == sorted(ends)
        service.idle()


def test_the_model_says_what_else_may_be_chosen(tmp_path: Path) -> None:
    with served(tmp_path, max_priority=3) as service:
        told = service.http.get("/v1/models").json()["data"][0]["sora"]
        assert told["loras"] == []
        assert told["experts"] == service.engine.model.num_experts
        assert told["labels"] is None
        assert told["max_priority"] == 3
        assert told["ladders"] == []
