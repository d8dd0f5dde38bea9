"""The house's habits that a reader cannot see in one file."""

from __future__ import annotations

import ast
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

from sora_engine.request import ResolvedRequest, recipe
from sora_engine.runtime import savepoint

ROOT = Path(__file__).parents[2]
SOURCES = {".py", ".cpp", ".cu", ".h", ".cuh"}
MOST_LINES = 450


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("which files are tracked is known in a git checkout alone, with git installed")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip(f"git cannot list the files here: {listed.stderr.strip()}")
    return listed.stdout.rstrip("\0").split("\0")


def test_no_source_file_is_long() -> None:
    sources = [
        name for name in tracked_files() if Path(name).suffix in SOURCES and (ROOT / name).is_file()
    ]
    assert Path(__file__).relative_to(ROOT).as_posix() in sources
    lengths = {name: len((ROOT / name).read_bytes().splitlines()) for name in sources}
    long = {name: n for name, n in lengths.items() if n > MOST_LINES}
    assert not long, f"over {MOST_LINES} lines, each to be split at a seam: {long}"


def test_no_files_import_each_other_in_a_circle() -> None:
    """`TYPE_CHECKING` imports and those within functions count like any others."""
    graph = grimp.build_graph("sora_engine", "sora_kernels", exclude_type_checking_imports=False)
    arrows = networkx.DiGraph(
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    )
    assert ("sora_engine.runtime.engine", "sora_engine.runtime.worker") in arrows.edges
    circles = [sorted(c) for c in networkx.strongly_connected_components(arrows) if len(c) > 1]
    assert not circles


def test_the_root_holds_no_more_than_its_faces() -> None:
    """Rooms, not loose files."""
    modules = {path.name for path in (ROOT / "sora_engine").glob("*.py")}
    assert modules == {
        *("__init__.py", "__main__.py", "config.py", "errors.py", "version.py", "video.py")
    }


def test_the_faces_of_rooms_are_modules_of_the_root() -> None:
    """By attribute and by import, and without torch: the command line answers before that loads."""
    code = """
import sys
import sora_engine, sora_engine.tasks, sora_engine.clips
from sora_engine.tasks import animate
from sora_engine.request import tasks
assert sora_engine.tasks is tasks and tasks.animate is animate
assert {"tasks", "Engine"} <= set(dir(sora_engine))
assert not {"torch", "numpy", "av"} & set(sys.modules)
from sora_engine.clips import load_frames
from sora_engine.request import frames
assert frames.load_frames is load_frames
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


OWN = ("models/wan/", "vae/wan", "bench/", "checkpoints/")
"""Where Wan may be named in code: its own folders and files, and what measures it."""
REGISTRIES = {"models/registry.py": 1, "vae/registry.py": 1}
"""And the lines by which it is known to the engine."""


def wan_in_code(source: str) -> dict[int, str]:
    """By line what names Wan: names, imports, strings. Docstrings may, to give an example."""
    tree = ast.parse(source)
    told = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = {}
    for node in ast.walk(tree):
        if id(node) in told:
            continue
        for field in ("id", "attr", "name", "module", "arg", "asname", "value"):
            text = getattr(node, field, None)
            if isinstance(text, str) and re.search(r"wan(?!t)", text, re.IGNORECASE):
                found[getattr(node, "lineno", 0)] = text
    return found


def test_no_family_is_named_outside_its_folder() -> None:
    root = ROOT / "sora_engine"
    named = {
        path.relative_to(root).as_posix(): wan_in_code(path.read_text(encoding="utf-8"))
        for path in root.rglob("*.py")
    }
    assert named["models/wan/family.py"]  # the search finds what is there
    elsewhere = {
        name: words
        for name, words in named.items()
        if len(words) > REGISTRIES.get(name, 0) and not name.startswith(OWN)
    }
    assert not elsewhere


def test_no_other_family_is_named_outside_its_folder() -> None:
    """By what is imported or told by name: the registry's line, and nothing else."""
    root = ROOT / "sora_engine"
    folders = [path.parent.name for path in root.glob("models/*/family.py")]
    assert {"wan", "dit", "latte"} <= set(folders)
    for name in set(folders) - {"wan"}:
        # A word by itself: trainers' prefixes of adapters, such as `pipe.dit.`, name no family.
        word = re.compile(rf"(?<![\w.]){name}(?![\w.])|models\.{name}\b", re.IGNORECASE)
        naming = {
            path.relative_to(root).as_posix(): [line for line in code_of(path) if word.search(line)]
            for path in root.rglob("*.py")
            if not path.is_relative_to(root / "models" / name)
        }
        assert {file: lines for file, lines in naming.items() if lines} == {
            "models/registry.py": naming["models/registry.py"]
        }
        assert len(naming["models/registry.py"]) == 1


def code_of(path: Path) -> list[str]:
    """Names, imports and strings of a file, its docstrings aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    fields = ("id", "attr", "name", "module", "arg", "asname", "value")
    found = (
        getattr(node, field, None)
        for node in ast.walk(tree)
        if id(node) not in told
        for field in fields
    )
    return [text for text in found if isinstance(text, str)]


def test_every_field_of_a_request_is_carried_wherever_a_request_goes() -> None:
    """A plain field by its list, any other by code of its own that names it."""
    carriers = {
        "runtime/savepoint.py": (savepoint._PLAIN, {"clips", "init", "latents"}),  # in the canvas
        "request/recipe.py": (
            recipe._PLAIN,
            # The provenance's own fields, and what follows from the grid.
            {"prompt", "seed", "canvas_height", "canvas_width", "canvas_frames"},
        ),
    }
    for file, (plain, elsewhere) in carriers.items():
        source = (ROOT / "sora_engine" / file).read_text(encoding="utf-8")
        for field in dataclasses.fields(ResolvedRequest):
            named = field.name in elsewhere or f'"{field.name}"' in source
            assert field.name in plain or named, f"{file} drops {field.name}"
