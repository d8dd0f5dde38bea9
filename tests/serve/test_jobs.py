"""What becomes of single jobs: adapters, deadlines, hooks, a device that fails once, expiry."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sora_engine as sora
from sora_engine.request import ResolvedRequest
from sora_engine.runtime.worker import Worker
from sora_engine.serve.answers import video_of
from sora_engine.serve.failures import ApiError
from tests.faults.engines import engine
from tests.serve.serving import SMALL, Service, served
from tests.unit.test_adapters_engine import make_adapter


def refuse_words(request: ResolvedRequest) -> None:
    if "forbidden" in request.prompt:
        raise sora.RefusedError("the prompt has a word that is not allowed")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "file-of-style.safetensors"
    make_adapter(path, seed=1, layers=range(6), scale=0.3)
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Iterator[Service]:
    options = {
        "loras": {"style": adapter},
        "hooks": sora.Hooks(check_request=refuse_words),
        "keep_latents": True,
        "max_priority": 2,
    }
    with served(tmp_path_factory.mktemp("jobs") / "data", **options) as made:
        yield made


def latents(service: Service, name: str) -> torch.Tensor:
    return load_file(service.data / "videos" / name / "latents.safetensors")["latents"]


def test_an_adapter_is_asked_for_by_its_registered_name(service: Service, adapter: Path):
    lora = {"name": "style", "strength": 0.5}
    told = service.ended(service.create(loras=[lora])["id"])
    assert told["status"] == "completed", told
    assert told["receipt"]["loras"] == ["file-of-style.safetensors:0.5"]
    request = sora.VideoRequest(
        SMALL["prompt"],
        height=32,
        width=32,
        num_frames=SMALL["num_frames"],
        num_inference_steps=SMALL["num_inference_steps"],
        seed=SMALL["seed"],
    )
    with engine() as made:
        plain = made.generate(request)
        made.load_lora(adapter, "style")
        want = made.generate(replace(request, loras=(sora.Lora("style", 0.5),)))
    got = latents(service, told["id"])
    scale = want.latents.abs().max()
    assert (got - want.latents).abs().max() <= 1e-5 * scale
    assert (plain.latents - want.latents).abs().max() > 1e-2 * scale  # the adapter does something
    models = service.http.get("/v1/models").json()["data"]
    assert models[0]["sora"]["loras"] == ["style"]
    for name in (str(adapter), adapter.name, "file-of-style"):
        answer = service.http.post("/v1/videos", json={**SMALL, "loras": [{"name": name}]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "loras"


def test_a_hook_refuses_before_anything_is_queued(service: Service):
    answer = service.http.post("/v1/videos", json={**SMALL, "prompt": "a forbidden word"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "refused")
    assert "not allowed" in answer.json()["error"]["message"]
    listed = service.http.get("/v1/videos?limit=100").json()["data"]
    assert all("forbidden" not in video["prompt"] for video in listed)


def test_a_deadline_counts_from_the_creation(service: Service):
    told = service.ended(service.create(deadline_s=0.001)["id"])
    assert (told["status"], told["error"]["code"]) == ("failed", "deadline")
    told = service.ended(service.create(deadline_s=60)["id"])
    assert told["status"] == "completed"


def test_the_priority_that_a_key_has_goes_first(service: Service, monkeypatch):
    desk = service.desk
    monkeypatch.setattr(desk, "_may_begin", lambda: False)
    low, high = service.create(seed=1), service.create(seed=2, priority=2)
    places = [desk.position(video["id"]) for video in (low, high)]
    assert places == [1, 0]
    monkeypatch.undo()
    for video in (low, high):
        assert service.ended(video["id"])["status"] == "completed"


def test_a_device_that_fails_once_costs_no_job(service: Service, monkeypatch):
    """The job goes on from its savepoint; at the second time it fails."""
    plain, failed = Worker._step, threading.Event()
    times = [1]

    def stepped(self: Worker, jobs: list[sora.Job]) -> None:
        if times[0] and jobs[0].progress.steps_done == 2:
            times[0] -= 1
            failed.set()
            self._device_failed(torch.AcceleratorError("CUDA error: an illegal memory access"))
            return
        plain(self, jobs)

    want = service.ended(service.create(num_inference_steps=5, seed=11)["id"])
    monkeypatch.setattr(Worker, "_step", stepped)
    told = service.ended(service.create(num_inference_steps=5, seed=11)["id"])
    assert failed.is_set()
    assert told["status"] == "completed"
    assert torch.equal(latents(service, told["id"]), latents(service, want["id"]))
    times[0] = 2
    told = service.ended(service.create(num_inference_steps=5, seed=11)["id"])
    assert (told["status"], told["error"]["code"]) == ("failed", "device_error")
    assert "illegal memory access" not in told["error"]["message"]


def test_a_job_whose_frames_cannot_be_is_told_why(service: Service):
    """What only the frames of clips tell comes when the job runs."""
    first = service.ended(service.create()["id"])
    clip = {"id": first["id"], "at": 3}  # it has 5 frames, and the video 5
    told = service.http.post("/v1/videos", json={**SMALL, "timeline": {"clips": [clip]}})
    video = told.json()
    if told.status_code == 200:
        video = service.ended(video["id"])
    error = video["error"]
    assert error["code"] == "invalid_value"
    assert str(service.data) not in error["message"]


def test_what_expired_is_told_apart(service: Service):
    name = service.ended(service.create()["id"])["id"]
    service.desk.store.change(name, "expired", when={"completed"})
    service.desk.files.remove(name)
    for path in (f"/v1/videos/{name}", f"/v1/videos/{name}/content"):
        answer = service.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "expired")
    assert service.http.post("/v1/videos/characters").status_code == 501


def test_a_job_is_not_made_by_another_model(service: Service, monkeypatch):
    desk = service.desk
    monkeypatch.setattr(desk, "_may_begin", lambda: False)
    name = service.create()["id"]
    desk.live(name).row.facts["weights"] = "of another model"
    monkeypatch.undo()
    told = service.ended(name)
    assert (told["status"], told["error"]["code"]) == ("failed", "model_changed")


def test_an_answer_never_goes_back(service: Service):
    """Its row may say `running` when its job has just ended."""
    desk = service.desk
    name = service.ended(service.create()["id"])["id"]
    before = replace(desk.store.get(name), state="running")
    assert video_of(desk, before).status == "completed"


def test_steps_that_take_less_than_a_second_are_not_kept_at_their_end(tmp_path, monkeypatch):
    """They are sooner made again; those of a job that was lost once are kept, each."""
    asked: list[dict[str, object]] = []
    submit = sora.Engine.submit

    def note(engine: sora.Engine, request: sora.VideoRequest, **options: object) -> sora.Job:
        asked.append(options)
        return submit(engine, request, **options)

    monkeypatch.setattr(sora.Engine, "submit", note)
    with served(tmp_path / "data", save_every_s=20.0) as made:
        made.ended(made.create()["id"])
        assert (asked[-1]["save_every_s"], asked[-1]["save_last_s"]) == (20.0, 1.0)
        fail = [True]
        step = Worker._step

        def once(worker: Worker, jobs: list[sora.Job]) -> None:
            if fail.pop() if fail else False:
                worker._device_failed(torch.AcceleratorError("CUDA error: an illegal access"))
                return
            step(worker, jobs)

        monkeypatch.setattr(Worker, "_step", once)
        assert made.ended(made.create()["id"])["status"] == "completed"
        assert (asked[-1]["save_every_s"], asked[-1]["save_last_s"]) == (None, 0.0)


def test_a_writer_that_finds_no_thread_begins_at_the_end(service: Service, monkeypatch):
    plain, refused = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name == "sora-writer" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert service.ended(service.create()["id"])["status"] == "completed"
    assert refused


def test_a_stream_asks_the_rows_only_of_what_may_be_gone(service: Service, monkeypatch) -> None:
    name = service.create(num_inference_steps=200)["id"]
    desk, live = service.desk, service.desk.live(name)
    owner = live.row.owner
    with pytest.raises(ApiError, match="no such video"):
        desk.watched("another", name, "video")
    with pytest.raises(ApiError, match="no such image"):
        desk.watched(owner, name, "image")
    with monkeypatch.context() as patch:
        patch.setattr(desk.store, "get", lambda _name: pytest.fail("the store was asked"))
        assert desk.watched(owner, name, "video").id == name
    assert service.http.delete(f"/v1/videos/{name}").status_code == 200
    with pytest.raises(ApiError, match="no such video"):
        desk.watched(owner, name, "video")
    done = service.ended(service.create()["id"])
    assert desk.watched(owner, done["id"], "video").state == "completed"
