"""Metrics: what Prometheus's own parser reads equals what was sent, and labels stay few."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sora_engine.serve.keys import Keys
from sora_engine.serve.metrics import CODES, OUTCOMES, REASONS, STAGES, Metrics
from tests.serve.serving import Service, served

ALLOWED = {
    "model": {"sprites"},
    "outcome": set(OUTCOMES),
    "code": {*CODES, "other"},
    "stage": set(STAGES),
    "reason": {*REASONS, "other"},
    "method": {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"},
}
NAMES = {
    *("sora_jobs_running", "sora_jobs_waiting", "sora_jobs", "sora_job_seconds"),
    *("sora_job_end_to_end_seconds", "sora_step_seconds", "sora_batch_tokens", "sora_batch_jobs"),
    *("sora_video_seconds", "sora_frames", "sora_real_time_factor", "sora_queue_refusals"),
    *("sora_memory_promised_bytes", "sora_memory_peak_bytes", "sora_resumed_jobs"),
    *("sora_upload_bytes", "sora_event_streams", "sora_disk_free_bytes", "sora_engine_up"),
    *("sora_draining", "sora_http_requests"),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data"), max_queue=1, max_running=1) as made:
        yield made


def read(service: Service) -> dict[str, float]:
    """Each sample, as `name{label=value,...}`."""
    answer = service.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_totals_are_what_was_sent(service: Service) -> None:
    before = read(service)
    done = [service.ended(service.create()["id"]) for _ in range(2)]
    slow = service.create(num_inference_steps=150)["id"]
    waits = service.create()["id"]
    full = service.http.post("/v1/videos", json={"prompt": "p", "size": "32x32", "num_frames": 1})
    assert full.status_code == 429
    mid = read(service)
    assert mid["sora_jobs_waiting"] + mid["sora_jobs_running"] == 2
    for name in (waits, slow):
        service.http.post(f"/v1/videos/{name}/cancel")
    assert service.ended(slow)["error"]["code"] == "cancelled"
    service.idle()
    after = read(service)

    def grew(name: str, by: float) -> None:
        assert after[name] - before.get(name, 0.0) == pytest.approx(by), name

    jobs = "sora_jobs_total{code=%s,model=sprites,outcome=%s}"
    grew(jobs % ("none", "completed"), 2)
    grew(jobs % ("cancelled", "cancelled"), 2)
    grew("sora_frames_total{model=sprites}", 10)
    grew("sora_video_seconds_total{model=sprites}", 10 / 8)
    grew("sora_job_end_to_end_seconds_count{model=sprites}", 4)
    grew("sora_real_time_factor_count{model=sprites}", 2)
    grew("sora_batch_jobs_sum{model=sprites}", 2)
    tokens = sum(told["receipt"]["largest_batch_tokens"] for told in done)
    grew("sora_batch_tokens_sum{model=sprites}", tokens)
    grew("sora_queue_refusals_total{reason=queue_full}", 1)
    grew("sora_http_requests_total{method=POST,status=429}", 1)
    grew("sora_job_seconds_count{model=sprites,stage=queued}", 4)
    grew("sora_job_seconds_count{model=sprites,stage=writing}", 2)
    for stage in ("encoding", "denoising", "decoding"):
        name = f"sora_job_seconds_sum{{model=sprites,stage={stage}}}"
        least = sum(told["stage_durations"][stage] for told in done)
        assert after[name] - before[name] >= least * 0.999
    assert after["sora_step_seconds_count{model=sprites}"] > 0
    assert after["sora_engine_up"] == 1
    assert after["sora_draining"] == after["sora_jobs_running"] == after["sora_jobs_waiting"] == 0
    assert after["sora_memory_promised_bytes"] == 0 < mid["sora_memory_promised_bytes"]
    assert after["sora_disk_free_bytes"] > 0
    assert after["sora_memory_peak_bytes"] > 1 << 26


def test_every_name_is_there_and_follows_the_rules(service: Service) -> None:
    families = list(text_string_to_metric_families(service.http.get("/metrics").text))
    ours = {family.name for family in families if not family.name.endswith("_created")}
    assert ours == NAMES
    for family in families:
        assert re.fullmatch(r"sora_[a-z_]+", family.name)


def test_labels_are_few_whatever_is_sent(service: Service) -> None:
    rng = random.Random(0)

    def word(letters: str = string.printable) -> str:
        return "".join(rng.choices(letters, k=12))

    for _ in range(8):
        service.http.post("/v1/videos", json={"prompt": word(), "model": word(), "x": word()})
        service.http.get(f"/v1/videos/{word(string.ascii_letters)}")
        service.http.request(word(string.ascii_uppercase), "/v1/videos")
        service.http.get(f"/{word(string.ascii_letters)}", headers={"Authorization": "Bearer x"})
    for family in text_string_to_metric_families(service.http.get("/metrics").text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label not in ("le", "status"):
                    assert value in ALLOWED[label], sample
            if "status" in sample.labels:
                assert re.fullmatch(r"[1-5]\d\d", sample.labels["status"])


def test_codes_and_reasons_that_are_unknown_are_other() -> None:
    metrics = Metrics()
    metrics.refused("x" * 100)
    assert b'reason="other"' in metrics.text()
    assert b"xxx" not in metrics.text()


def test_metrics_can_be_left_out_and_are_shut_to_others(tmp_path: Path) -> None:
    with served(tmp_path / "a", metrics=False) as made:
        assert made.http.get("/metrics").status_code == 404
    key = "a-key-of-some-length"
    with served(tmp_path / "b", host="0.0.0.0", api_key=key) as made:
        assert isinstance(made.app.state.keys, Keys)
        assert made.http.get("/metrics").status_code == 401
        known = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{made.url}/metrics", headers=known).status_code == 200
