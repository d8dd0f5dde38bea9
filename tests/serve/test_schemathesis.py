"""The OpenAPI document, by schemathesis: whatever it allows, or not, no answer is a 5xx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.serve.serving import Service, served

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode  # noqa: E402


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Small jobs alone, and room for few: most of what is made up is refused."""
    small = {"max_pixels": 64 * 64, "max_frames": 9, "max_steps": 2, "max_queue": 8}
    with served(tmp_path_factory.mktemp("data"), **small) as made:
        yield made


def called(service: Service, examples: int) -> Counter[int]:
    """So many calls of each operation; how often each status was answered."""
    document = service.app.openapi()
    name = service.ended(service.create()["id"])["id"]
    for path in document["paths"].values():  # half of the ids are of a video that is there
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "video_id":
                    parameter["examples"] = {"known": {"value": name}}
    schema = schemathesis.openapi.from_dict(document)
    statuses: Counter[int] = Counter()
    broken: list[str] = []
    session = httpx.Client(base_url=service.url, timeout=60)

    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=max(1, examples // 2),
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                answer = case.call(base_url=service.url, timeout=60)
                statuses[answer.status_code] += 1
                if answer.status_code >= 500:
                    broken.append(f"{case.as_curl_command()}: {answer.status_code} {answer.text}")

            try:
                ask()
            except hypothesis.errors.Unsatisfiable:
                continue  # no value is wrong for an operation without parameters
    session.close()
    assert not broken, "\n".join(broken[:10])
    assert service.app.state.service.state == "ready"
    service.ended(service.create()["id"])
    return statuses


def test_no_call_that_is_made_up_is_a_5xx(service: Service) -> None:
    statuses = called(service, 4)
    assert sum(statuses.values()) > 80
    assert {200, 400, 404} <= set(statuses)


@pytest.mark.slow
def test_no_call_of_2000_is_a_5xx(service: Service) -> None:
    statuses = called(service, 115)
    print(statuses)
    assert sum(statuses.values()) >= 2000
