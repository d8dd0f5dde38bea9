"""Spans, and the examples of how a service is run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace

from sora_engine.serve.settings import Settings, settings_from
from sora_engine.serve.tracing import Tracing
from tests.serve.serving import Service, served
from tests.serve.test_metrics import NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")
EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Span(trace.NonRecordingSpan):
    """One that keeps what it is told."""

    def __init__(self, name: str, context: Any, kind: Any, attributes: Any, start: int) -> None:
        super().__init__(trace.SpanContext(1, id(self) & (1 << 63) - 1, False))
        self.name, self.kind, self.attributes, self.start = name, kind, attributes, start
        self.parent = trace.get_current_span(context) if context is not None else None
        self.stop = 0
        self.status: Any = None

    def set_status(self, status: Any, description: str | None = None) -> None:
        self.status = status, description

    def end(self, end_time: int | None = None) -> None:
        self.stop = end_time or 0


class Recorder(trace.TracerProvider):
    """The API's provider, as an SDK would be: it keeps all spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def get_tracer(self, *_names: Any, **_options: Any) -> Any:
        recorder = self

        class Tracer:
            def start_span(
                self,
                name: str,
                context: Any = None,
                kind: Any = None,
                attributes: Any = None,
                start_time: int = 0,
            ) -> Span:
                recorder.spans.append(Span(name, context, kind, attributes, start_time))
                return recorder.spans[-1]

        return Tracer()


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, recorder: Recorder) -> Iterator[Service]:
    patch = pytest.MonkeyPatch()
    patch.setattr("sora_engine.serve.around.Tracing", lambda: Tracing(recorder))
    with served(tmp_path_factory.mktemp("data"), otel=True) as made:
        patch.undo()
        yield made


def test_a_job_is_a_span_with_its_stages(service: Service, recorder: Recorder) -> None:
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    told = service.ended(service.create(parent, prompt="a secret")["id"])
    service.idle()
    span, *stages = recorder.spans
    assert span.name == "generate_content sprites"
    assert span.kind is trace.SpanKind.SERVER
    assert span.parent is not None
    context = span.parent.get_span_context()
    assert f"{context.trace_id:032x}" == TRACE
    assert f"{context.span_id:016x}" == PARENT
    assert span.attributes == {
        **{"gen_ai.operation.name": "generate_content", "gen_ai.provider.name": "sora_engine"},
        **{"gen_ai.output.type": "video", "gen_ai.request.model": "sprites"},
        **{"gen_ai.request.seed": 7, "sora.steps": 2, "sora.frames": 5},
    }
    assert [stage.name for stage in stages] == ["encoding", "denoising", "decoding", "writing"]
    for stage in stages:
        assert stage.parent is span
        length = (stage.stop - stage.start) / 1e9
        assert length == pytest.approx(told["stage_durations"][stage.name], abs=1e-5)
        assert span.start - 1e6 <= stage.start <= stage.stop <= span.stop
    assert span.status is None


def test_a_job_that_ends_otherwise_is_a_span_that_says_so(
    service: Service, recorder: Recorder
) -> None:
    recorder.spans.clear()
    odd = {"traceparent": "00-xyz-1-01"}
    name = service.create(odd, num_inference_steps=200)["id"]
    service.http.post(f"/v1/videos/{name}/cancel")
    service.ended(name)
    service.idle()
    span = recorder.spans[0]
    assert span.parent is None  # what is no traceparent is left out
    assert span.attributes["error.type"] == "cancelled"
    assert span.status == (trace.StatusCode.ERROR, "cancelled")


def test_the_example_configuration_is_one() -> None:
    config = tomllib.loads((EXAMPLES / "serve.toml").read_text())
    settings = settings_from({}, {}, config)
    assert settings.keep_s == 7 * 86400
    assert settings.max_upload == 64 << 20
    assert settings.log_json
    assert settings.allow_hosts == ("videos.example.org",)


def test_the_unit_waits_for_longer_than_the_drain_and_names_the_exit_codes() -> None:
    unit = (EXAMPLES / "sora-serve.service").read_text()
    config = tomllib.loads((EXAMPLES / "serve.toml").read_text())
    drain_s = settings_from({}, {}, config).drain_timeout_s
    lines = dict(
        line.split("=", 1) for line in unit.splitlines() if "=" in line and line[0] not in "#["
    )
    assert int(lines["TimeoutStopSec"]) >= drain_s + 30
    assert lines["RestartPreventExitStatus"].split() == ["1", "2"]
    assert lines["Restart"] == "on-failure"


def test_the_container_needs_a_key_and_its_names_are_settings() -> None:
    text = (EXAMPLES / "Containerfile").read_text()
    words = next(line for line in text.splitlines() if line.startswith("ENV ")).split()[1:]
    environment = dict(word.split("=", 1) for word in words)
    with pytest.raises(ValueError, match="there is no key"):
        settings_from({}, environment, {})
    settings = settings_from({}, {**environment, "SORA_API_KEY": "a-key-of-some-length"}, {})
    assert (settings.host, str(settings.data_dir)) == ("0.0.0.0", "/data")
    assert settings.log_json
    assert Settings().host == "127.0.0.1"


def test_the_page_names_every_metric_and_no_other() -> None:
    told = set(re.findall(r"`(sora_[a-z_]+)(?:\{[a-z,]+\})?`", PAGE))
    assert {name.removesuffix("_total") for name in told} == NAMES


def test_the_page_tells_the_bounds_as_they_are() -> None:
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    bounds = {row[2].strip(" `"): row[1] for row in rows if re.fullmatch(r" `[a-z-]+` ", row[2])}
    assert len(bounds) == 5
    default = Settings()
    for name, words in bounds.items():
        given = settings_from({}, {}, {name: "5000"})
        field = name.replace("-", "_")
        field = field if hasattr(default, field) else f"{field}_s"
        assert getattr(given, field) == 5000
        value = getattr(default, field)
        shown = {16 << 10: "16 KiB", 64 << 20: "64 MiB"}.get(value, f"{value:g}")
        assert shown in words, (name, shown)
