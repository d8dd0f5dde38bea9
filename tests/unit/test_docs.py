"""The docs beside the code: tables of fields, links, and figures that a script prints."""

from __future__ import annotations

import ast
import dataclasses
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import sora_engine as sora
from sora_engine import Limits, VideoRequest
from sora_engine.cli.app import app

ROOT = Path(__file__).parents[2]
REQUESTS = (ROOT / "docs" / "requests.md").read_text()
PLACES = ("*.md", "docs/*.md", "examples/*/*.md", "sora_engine/checkpoints/*/*.md")
PAGES = sorted(page for place in PLACES for page in ROOT.glob(place))


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The cells behind the first of each row of the table below `heading`, by its field's name."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    found = {cells[0].strip("`"): cells[1:] for cells in table}
    assert len(found) == len(table), "a field stands twice in the table"
    return found


def default_in(cell: str) -> object:
    return dataclasses.MISSING if cell == "required" else ast.literal_eval(cell.strip("`"))


@pytest.mark.parametrize("of", [VideoRequest, Limits])
def test_every_field_stands_in_its_table_with_its_default(of: type) -> None:
    table = rows(REQUESTS, f"Fields of `{of.__name__}`")
    fields = dataclasses.fields(of)
    assert list(table) == [field.name for field in fields]
    typed = of is VideoRequest
    for field in fields:
        cells = table[field.name]
        if typed:
            assert cells[0] == str(field.type).replace(" | ", " or "), field.name
        told = default_in(cells[1 if typed else 0])
        assert told == field.default, field.name
        assert type(told) is type(field.default), field.name
        assert cells[-1], field.name


def options_of(command: object) -> set[str]:
    """All options of a command and of those below it, and its arguments' names in capitals."""
    found = set()
    for parameter in getattr(command, "params", ()):
        named = parameter.param_type_name == "argument"
        found |= {parameter.name.upper()} if named else set(parameter.opts)
    for child in getattr(command, "commands", {}).values():
        found |= options_of(child)
    return found


def test_the_options_of_request_fields_are_those_of_the_command_line() -> None:
    from sora_engine.cli.options import _OPTION_OF

    known = options_of(typer.main.get_command(app))
    assert "--frames" in known  # the walk over the commands found them
    table = rows(REQUESTS, "Fields of `VideoRequest`")
    told = {name: re.findall(r"`(.+?)`", cells[2]) for name, cells in table.items()}
    assert [option for options in told.values() for option in options if option not in known] == []
    for name, option in _OPTION_OF.items():
        assert option in told.get(name, [option]), name


@pytest.fixture(scope="module")
def engine() -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained("sprites") as made:
        yield made


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_pixels", 64 * 80 - 1),
        ("max_frames", 4),
        ("max_inference_steps", 1),
        ("max_prompt_chars", 7),
        ("memory_bytes", 1),
    ],
)
def test_the_error_that_the_table_names_is_raised(
    limit: str, value: int, engine: sora.Engine
) -> None:
    named = re.findall(r"`(\w+Error)`", rows(REQUESTS, "Fields of `Limits`")[limit][-1])
    request = VideoRequest(
        "8 signs.", "8 signs.", height=64, width=80, num_frames=5, num_inference_steps=2
    )
    with sora.Engine(engine.model, limits=Limits(**{limit: value + 1})) as larger:
        larger.resolve(request)
    with sora.Engine(engine.model, limits=Limits(**{limit: value})) as limited:
        with pytest.raises(sora.SoraError) as refused:
            limited.submit(request)
        assert [type(refused.value).__name__] == named


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        to = page if not path else (page.parent / path).resolve()
        if not to.exists():
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", prose(to), flags=re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(target)
    assert broken == []


NAMED = re.compile(
    r"`((?:sora_engine|kernels|csrc|tests|benchmarks|examples)/[\w./-]+)(?: [^`]*)?`"
)
# A changelog names what was.
OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    assert [name for name in NAMED.findall(page.read_text()) if not (ROOT / name).exists()] == []


def test_every_module_that_a_page_names_can_be_imported() -> None:
    names = {
        name
        for page in OF_TODAY
        for name in re.findall(r"`(sora_(?:engine|kernels)\.[\w.]+)[`(]", page.read_text())
    }
    assert len(names) > 5
    assert [name for name in sorted(names) if not resolves(name)] == []


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_version_is_one() -> None:
    """Of the package, of a source tree without an installation, and of the newest entry."""
    places = {
        "pyproject.toml": r'^version = "(.+)"$',
        "sora_engine/version.py": r'return "(.+)"$',
        "CHANGELOG.md": r"^## \[(\d.*)\]",
    }
    found = [re.search(at, (ROOT / name).read_text(), re.MULTILINE) for name, at in places.items()]
    assert len({match[1] for match in found if match is not None}) == 1
    assert None not in found


@pytest.mark.parametrize("function", ["weights_table", "peaks_table"])
def test_the_figures_of_a_published_wan_are_what_the_script_prints(function: str) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "predict_memory.py"))
    table = "\n".join(script[function]())
    assert table in (ROOT / "docs" / "wan.md").read_text()


def test_the_example_of_worlds_runs(tmp_path: Path) -> None:
    from tests.unit.world_folder import save_world

    (example,) = re.findall(r"^```python\n(.*?)^```$", read_worlds(), re.DOTALL | re.MULTILINE)
    named = re.findall(r'from_pretrained\("(.+?)"\)', example)
    assert len(named) == 1
    there: dict[str, object] = {}
    exec(example.replace(named[0], str(save_world(tmp_path / "world"))), there)
    world = there["world"]
    assert isinstance(world, sora.Session)
    assert world.closed
    assert world.num_steps == 1  # rewound to the mark behind the first step


def read_worlds() -> str:
    return (ROOT / "docs" / "worlds.md").read_text()


def test_the_keys_of_sora_play_are_those_of_its_table() -> None:
    from sora_engine.cli.play.player import COMMANDS

    table = read_worlds().split("| key | what it does |\n", 1)[1].split("\n\n", 1)[0]
    told = {key.strip("`") for line in table.splitlines() for key in re.findall(r"`\w`", line)}
    assert told == {key for key in COMMANDS if len(key) == 1}
    assert "| Tab |" in table
