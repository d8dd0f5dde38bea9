"""What the limits of containers and shells leave, on trees of files as kernels write them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sora_engine.io.memory_limits import left_under_limits

MIB = 1 << 20


def tree(root: Path, cgroup: str, **files: str) -> Path:
    """A root with `/proc/self/cgroup`, and files below `/sys/fs/cgroup` ("__" is a slash)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(folder: str, limit: str, used: int, dropped: int = 0) -> dict[str, str]:
    return {
        f"{folder}memory_DOT_max": f"{limit}\n",
        f"{folder}memory_DOT_current": f"{used}\n",
        f"{folder}memory_DOT_stat": f"anon 5\ninactive_file {dropped}\nfile 9\n",
    }


def v1(folder: str, limit: int, used: int, dropped: int = 0) -> dict[str, str]:
    return {
        f"{folder}memory_DOT_limit_in_bytes": f"{limit}\n",
        f"{folder}memory_DOT_usage_in_bytes": f"{used}\n",
        f"{folder}memory_DOT_stat": f"cache 7\ntotal_inactive_file {dropped}\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "left"),
    [
        # A container: it sees its own group as the topmost one.
        ("0::/\n", v2("", f"{512 * MIB}", 200 * MIB, 50 * MIB), 362 * MIB),
        # A service on a machine: the group round it is the tighter one.
        (
            "0::/a.slice/b.service\n",
            v2("a.slice__b.service__", "max", 10 * MIB)
            | v2("a.slice__", f"{300 * MIB}", 100 * MIB),
            200 * MIB,
        ),
        (
            "0::/a/b\n",
            v2("a__b__", f"{100 * MIB}", 60 * MIB) | v2("a__", f"{300 * MIB}", 100 * MIB),
            40 * MIB,
        ),
        # More is used than is allowed: a limit that was lowered.
        ("0::/\n", v2("", f"{100 * MIB}", 200 * MIB), 0),
        ("0::/\n", v2("", "max", 200 * MIB), None),
        # Version 1, whose container is told the machine's path and sees its own group.
        (
            "5:devices:/x\n4:memory:/docker/0123\n0::/\n",
            v1("memory__", 400 * MIB, 100 * MIB, 20 * MIB),
            320 * MIB,
        ),
        (
            "4:cpu,memory:/jobs/7\n",
            v1("memory__jobs__7__", 200 * MIB, 150 * MIB) | v1("memory__", 2**63 - 4096, 9),
            50 * MIB,
        ),
        ("4:memory:/\n", v1("memory__", 2**63 - 4096, 100 * MIB), None),
        # None of it, or other things in its place.
        ("", {}, None),
        ("4:memory:/../../etc\n", {}, None),
        ("nonsense\n", {"memory_DOT_max": "x"}, None),
    ],
)
def test_the_tightest_group_counts(tmp_path, cgroup, files, left):
    assert left_under_limits(tree(tmp_path, cgroup, **files)) == left


def test_without_proc_there_is_no_limit(tmp_path):
    assert left_under_limits(tmp_path) is None


def test_the_shells_limit_of_addresses_counts(tmp_path):
    """In a process of its own, as the limit stays: 3 GiB, less what an interpreter takes."""
    pytest.importorskip("resource")
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, resource.RLIM_INFINITY))\n"
        "from pathlib import Path\n"
        "from sora_engine.io.memory_limits import left_under_limits\n"
        "print(left_under_limits())\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (2 << 30) < int(said.stdout) < (3 << 30)
