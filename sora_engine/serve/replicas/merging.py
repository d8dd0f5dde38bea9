"""What several servers say, as one answer: lists of videos, and figures for Prometheus."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client.core import CollectorRegistry, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sora_engine.serve.ids import read_id


def merged_list(
    pages: Sequence[dict[str, Any]], limit: int, *, newest: bool, missing: Sequence[str] = ()
) -> dict[str, Any]:
    """One page out of each server's own, which begin behind the same id.

    The order is that of the ids' moments, and of replicas' names within a microsecond; a server's
    own videos stay as it has them. missing: servers that did not answer, which the page then names.
    """
    merged = heapq.merge(*(page["data"] for page in pages), key=_place, reverse=newest)
    data = list(merged)
    more = len(data) > limit or any(page["has_more"] for page in pages)
    data = data[:limit]
    told = {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": more,
    }
    return {**told, "missing_replicas": list(missing)} if missing else told


def _place(video: dict[str, Any]) -> tuple[float, str]:
    replica, created = read_id(video["id"]) or ("", float(video["created_at"]))
    return created, replica


def merged_metrics(texts: Mapping[str, str], own: Mapping[str, Mapping[str, float]]) -> bytes:
    """All servers' figures, each with the label `replica`. own: gauges of the proxy, by name and
    replica."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue
            kept = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                kept.add_sample(sample.name, labels, sample.value)
    for name, values in own.items():
        gauge = families.setdefault(name, Metric(name, _TOLD.get(name, name), "gauge"))
        for replica, value in values.items():
            gauge.add_sample(name, {"replica": replica}, value)
    registry = CollectorRegistry()
    registry.register(_Given(list(families.values())))  # type: ignore[arg-type]
    return generate_latest(registry)


_TOLD = {
    "sora_replica_up": "whether a replica takes jobs",
    "sora_replica_restarts": "how often a replica was started anew",
}


class _Given:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
