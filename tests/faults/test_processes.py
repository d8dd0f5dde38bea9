"""The tests' own eyes: in which order they see processes."""

from __future__ import annotations

from pathlib import Path

from tests.faults import processes


def test_ranks_stand_in_the_order_of_their_start_also_where_numbers_wrap_round(monkeypatch) -> None:
    """Seen on a machine that had just given out its last number: 303, 307, 310, 32765."""
    tree = {1: [32760], 32760: [32764], 32764: [32765, 303, 307, 310]}
    monkeypatch.setattr(processes, "children", lambda pid: tree.get(pid, []))
    alive = {child: parent for parent, found in tree.items() for child in found}
    monkeypatch.setattr(processes, "parents", lambda: alive)
    monkeypatch.setattr(processes, "is_rank", lambda pid: pid != 32760)
    assert processes.descendants(1) == [32764, 32765, 303, 307, 310]
    del alive[303]
    assert processes.descendants(1) == [32764, 32765, 307, 310]


def test_children_come_as_they_were_started() -> None:
    import os
    import subprocess

    started = [subprocess.Popen(["sleep", "60"]) for _ in range(4)]
    try:
        seen = [pid for pid in processes.children(os.getpid()) if pid in {p.pid for p in started}]
        assert seen == [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert processes.children(2**22 + 1) == []
    assert Path("/proc/self/task").is_dir()
