"""A home of Ray Serve that is killed: another process takes up its jobs."""

from __future__ import annotations

import pytest

from tests.serve.clusters import home_of
from tests.serve.ray_cluster import RayCluster
from tests.serve.test_replicas import names

pytestmark = pytest.mark.slow


def test_a_dead_homes_jobs_are_taken_over(tmp_path):
    pytest.importorskip("ray")
    with RayCluster(tmp_path / "data", 2, save_every="0.2s") as cluster:
        made = [cluster.create(seed=i, num_inference_steps=40)["id"] for i in range(8)]
        homes = {home_of(name) for name in made}
        assert homes == {"0", "1"}
        cluster.kill("0")
        for name in made:
            cluster.completed(name, 180)
        assert [name for name in names(cluster) if name in made] == made[::-1]
        assert set(cluster.states().values()) == {"ready"}
