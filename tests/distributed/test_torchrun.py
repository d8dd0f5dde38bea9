"""`torchrun -m sora_engine generate`: the video of one process, on one node and on two."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sora_engine import cli
from sora_engine.io.video_reader import read_video
from tests.faults.processes import descendants

ROOT = Path(__file__).parents[2]
COMMAND = ["generate", "a red circle moves right on a white background", "--seed", "3"]
COMMAND += ["--steps", "4", "--frames", "9", "--size", "48x32"]


def environment(**more):
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def torchrun(*arguments, **more):
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "sora_engine"]
    return lambda *rest: subprocess.Popen(
        [*command, *rest],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    """One that nobody is given for a connection of their own between this and its use."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first - 10_000, first)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


def finish(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "frames"
    assert cli.main([*COMMAND, "-o", str(folder)]) == 0
    return read_video(folder)[0]


def check_same(folder, expected):
    made = read_video(folder)[0]
    assert made.shape == expected.shape
    differ = np.abs(made.astype(int) - expected)
    assert differ.max() <= 1  # a pixel whose value lay between two may have rounded the other way
    assert (differ > 0).mean() < 1e-3
    assert descendants() == []


def test_two_processes_make_the_video_of_one(tmp_path, alone):
    run = torchrun("--nproc-per-node", "2", "--master-port", free_port())
    out = finish(run(*COMMAND, "-o", str(tmp_path / "frames")))
    assert out.count("making 48x32") == 1  # rank 0 alone speaks and writes
    check_same(tmp_path / "frames", alone)


@pytest.mark.slow
def test_two_nodes_make_the_video_of_one(tmp_path, alone):
    """Two launchers with a rank each, whose rendezvous is an address."""
    port = free_port()
    nodes = [
        torchrun(
            *("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"),
            *("--master-addr", "127.0.0.2", "--master-port", port),
            GLOO_SOCKET_IFNAME="lo",
        )(*COMMAND, "--parallel", "guidance=2", "-o", str(tmp_path / "frames"))
        for node in (0, 1)
    ]
    for node in nodes:
        finish(node)
    check_same(tmp_path / "frames", alone)


@pytest.mark.slow
def test_a_layout_of_another_size_is_refused(tmp_path):
    run = torchrun("--nproc-per-node", "2", "--master-port", free_port())
    process = run(*COMMAND, "--parallel", "ring=3", "-o", str(tmp_path / "frames"))
    _, err = process.communicate(timeout=500)
    assert process.returncode != 0
    assert "ring=3 takes 3 ranks, and 2 were started; these would work: ring=2" in err
