"""What somebody meets who has never seen the page: it is in sight, named, and stays still."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serve.browsers import Page, chromium, opened, sync_api
from tests.serve.serving import Service, served

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
LAPTOP = {"viewport": {"width": 1280, "height": 800}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data")) as service:
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def heights(page: Page, *selectors: str) -> list[float]:
    """Where parts of the page are, from its own top."""
    return [
        page.tab.locator(one).evaluate("e => e.getBoundingClientRect().top + scrollY")
        for one in selectors
    ]


def test_a_prompt_of_the_models_own_kind_is_shown_first(browser: Any, service: Service) -> None:
    with opened(browser, service) as page:
        like = service.engine.model.defaults.example_prompt
        assert like
        assert like in page.tab.get_by_label("Prompt").first.get_attribute("placeholder")


@pytest.mark.parametrize("loop", [False, True])
def test_two_pictures_of_ones_own_are_told_apart_and_stand_for_a_latent_frame(
    browser: Any, service: Service, tmp_path: Path, loop: bool
) -> None:
    with opened(browser, service, **LAPTOP) as page:
        page.fill("a circle", steps="3")
        if loop:
            page.tab.get_by_label("Loop").check()
            page.tab.locator("#length").select_option("8")
        for name, size in (("one.png", (64, 48)), ("two.png", (48, 48))):
            Image.new("RGB", size, "navy").save(tmp_path / name)
            page.tab.locator("#file").set_input_files(tmp_path / name)
            sync_api.expect(page.tab.locator("#status")).to_contain_text(name)
            whole = "its middle is taken" not in page.tab.locator("#status").inner_text()
            assert whole == (size == (48, 48))
        cards = page.tab.locator(".card.picture")
        total = page.tab.locator("#cards").bounding_box()["width"]
        bars = [cards.nth(n).locator(".bar").bounding_box()["width"] / total for n in (0, 1)]
        assert bars == pytest.approx([4 / 8, 4 / 8] if loop else [1 / 5, 4 / 5], abs=0.02)
        sync_api.expect(cards.nth(1)).to_contain_text("two.png")
        page.tab.reload()
        sync_api.expect(cards.nth(1)).to_contain_text("two.png")
        page.done(page.make())
        for _ in range(2):
            page.tab.get_by_label("Remove Picture").first.click()


@pytest.mark.parametrize("options", [PHONE, LAPTOP], ids=["phone", "laptop"])
def test_a_job_and_then_its_video_come_into_sight(
    browser: Any, service: Service, options: dict[str, Any]
) -> None:
    with opened(browser, service, **options) as page:
        page.fill("a red circle", steps="20")
        page.tab.locator("#length").select_option("17")
        name = page.make()
        sync_api.expect(page.tab.locator(f"#queue [data-id='{name}']")).to_be_in_viewport()
        sync_api.expect(page.tab.locator(f"#gallery [data-id='{name}'] video")).to_be_in_viewport(
            ratio=0.9
        )


def test_who_writes_on_is_not_taken_away(browser: Any, service: Service) -> None:
    with opened(browser, service, **PHONE) as page:
        page.fill("a red circle", steps="20")
        name = page.make()
        page.tab.get_by_label("Prompt").first.focus()
        page.tab.locator(f"#gallery [data-id='{name}']").wait_for()
        sync_api.expect(page.tab.get_by_label("Prompt").first).to_be_in_viewport()


def test_nothing_moves_as_jobs_come_and_go(browser: Any, service: Service) -> None:
    parts = ("#prompt", "#make", "#gallery")
    with opened(browser, service, **LAPTOP) as page:
        page.fill("a red circle moves right over a field of many words", steps="40")
        before = pytest.approx(heights(page, *parts), abs=1)
        name = page.make()
        page.tab.locator(f"#queue [data-id='{name}'] img").wait_for()
        assert heights(page, *parts) == before
        page.done(name)
        assert heights(page, *parts) == before
    with opened(browser, service, **PHONE) as page:
        before = pytest.approx(heights(page, "#prompt", "#make"), abs=1)
        page.fill("a red circle moves right over a field of many words", steps="3")
        page.tab.get_by_text("More settings").click()
        page.done(page.make())
        sync_api.expect(page.tab.locator("#status")).to_contain_text("done")
        assert heights(page, "#prompt", "#make") == before


def test_a_video_says_what_was_done(browser: Any, service: Service) -> None:
    with opened(browser, service, **LAPTOP) as page:
        page.fill("a red circle", steps="3")
        first = page.make()
        card = page.done(first)
        facts = card.locator(".facts")
        assert facts.inner_text().startswith("32x32")
        for button, path, told, task in (
            ("Extend after", "/extensions", "Extended: 32x32", "extend"),
            ("Loop", "/loop", "Loop: 32x32", "loop"),
            ("Edit", "/edits", "Edited: 32x32", "edit"),
            ("Remix", "/remix", "Remix: 32x32", "create"),
        ):
            name = page.act(card, button, path)
            assert service.ended(name)["task"] == task
            assert page.done(name).locator(".facts").inner_text().startswith(told)
        page.tab.get_by_label("Loop").check()
        name = page.make()
        assert service.ended(name)["task"] == "loop"


def test_the_time_is_told_once_it_is_known(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path) as fresh, opened(browser, fresh) as page:
        page.fill("a red circle", steps="3")
        plan = page.tab.locator("#plan")
        sync_api.expect(plan).to_contain_text("promised")
        assert "about" not in plan.inner_text()
        page.done(page.make())
        sync_api.expect(plan).to_contain_text("about")


def test_a_quick_stroke_of_the_brush_has_no_gaps(browser: Any, service: Service) -> None:
    with opened(browser, service, **LAPTOP) as page:
        page.fill("a red circle", steps="3")
        card = page.done(page.make())
        card.get_by_role("button", name="Inpaint").click()
        canvas = page.tab.locator("#brush-canvas")
        box = canvas.bounding_box()
        row = box["y"] + box["height"] / 2
        page.tab.mouse.move(box["x"] + 0.1 * box["width"], row)
        page.tab.mouse.down()
        page.tab.mouse.move(box["x"] + 0.9 * box["width"], row)  # in one jump
        page.tab.mouse.up()
        painted = canvas.evaluate(
            "one => [...one.getContext('2d').getImageData(0, one.height / 2, one.width, 1).data]"
            ".filter((_, i) => i % 4 === 3).map(alpha => alpha > 127)"
        )
        inside = painted[round(0.1 * len(painted)) : round(0.9 * len(painted))]
        assert all(inside), inside
        page.tab.keyboard.press("Escape")
