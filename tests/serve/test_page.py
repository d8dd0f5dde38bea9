"""The page in a real browser: each task, its look, its policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.browsers import Page, chromium, opened, sync_api
from tests.serve.serving import Service, served


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data")) as service:
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, service: Service) -> Iterator[Page]:
    with opened(browser, service) as page:
        yield page


def test_a_video_is_made_extended_looped_and_connected(page: Page) -> None:
    page.fill("a red circle moves right", steps="3")
    plan = page.tab.locator("#plan")
    sync_api.expect(plan).to_contain_text("promised", timeout=20_000)
    sync_api.expect(plan).to_contain_text("3 steps")
    first = page.make()
    card = page.done(first)
    extended = page.act(card, "Extend after", "/extensions")
    told = page.service.ended(extended)
    assert told["num_frames"] > page.service.ended(first)["num_frames"]
    page.done(extended)
    looped = page.act(card, "Loop", "/loop")
    page.done(looped)
    card.get_by_role("button", name="Connect", exact=True).click()
    assert page.tab.locator("#pick").is_visible()
    other = page.tab.locator(f"#gallery [data-id='{looped}']")
    connected = page.act(other, "Connect", "/connect")
    page.done(connected)
    page.shot("gallery")
    card.get_by_text("How it was made").click()
    sync_api.expect(card.locator("pre")).to_contain_text("a red circle moves right")
    other.get_by_role("button", name="Delete").click()
    other.wait_for(state="detached")


def test_previews_come_a_job_is_cancelled_and_a_reload_comes_back_to_one(page: Page) -> None:
    page.fill("a blue square spins slowly", steps="150")
    name = page.make()
    job = page.tab.locator(f"#queue [data-id='{name}']")
    page.tab.wait_for_selector("#queue img:not([hidden])")
    assert "step" in job.locator(".stage").inner_text()
    page.shot("making")
    page.tab.reload()
    job.wait_for()
    assert page.tab.get_by_label("Prompt").first.input_value() == "a blue square spins slowly"
    assert page.tab.locator("#steps").input_value() == "150"
    job.get_by_role("button", name="Cancel").click()
    job.wait_for(state="detached")
    assert page.service.ended(name)["error"]["code"] == "cancelled"


def test_cards_of_text_and_picture_are_placed_by_keyboard_alone(page: Page, tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "a.png")
    page.fill("a red circle", steps="2")
    page.tab.locator("#length").select_option("17")
    page.tab.locator("#file").set_input_files(tmp_path / "a.png")
    picture = page.tab.get_by_role("listitem", name="Picture at frame 0")
    picture.wait_for()
    add = page.tab.get_by_role("button", name="Add text")
    add.focus()
    page.tab.keyboard.press("Enter")
    card = page.tab.locator(".card.text")
    at = int(str(card.get_attribute("aria-label")).rsplit(" ", 1)[1])
    page.tab.keyboard.press("ArrowRight")
    moved = int(str(card.get_attribute("aria-label")).rsplit(" ", 1)[1])
    step = page.service.http.get("/v1/models").json()["data"][0]["sora"]["grid"]["time"]
    assert moved - at == step
    assert moved % step == 1
    page.tab.keyboard.press("Enter")
    page.tab.keyboard.type("a blue circle")
    page.tab.keyboard.press("Enter")
    page.shot("timeline")
    name = page.make()
    page.done(name)
    told = page.service.http.get(f"/v1/videos/{name}/request").json()
    assert [shot["prompt"] for shot in told["fields"]["shots"]] == ["a red circle", "a blue circle"]
    assert told["fields"]["shots"][0]["num_frames"] == moved
    assert len(told["fields"]["clips"]) == 1
    page.tab.locator(".card.picture").focus()
    page.tab.keyboard.press("Delete")
    assert page.tab.locator(".card.picture").count() == 0
    page.tab.locator(".card.text").focus()
    page.tab.keyboard.press("Delete")
    made = page.tab.locator(f"#gallery [data-id='{name}']")
    made.get_by_role("button", name="Same again").click()
    again = page.tab.get_by_role("listitem", name=f"Text at frame {moved}")
    again.wait_for()
    picture.wait_for()
    assert again.get_by_label("Words").input_value() == "a blue circle"


def test_a_region_is_painted_and_made_anew(page: Page) -> None:
    made = page.service.create(prompt="a green triangle", size="64x64")["id"]
    page.service.ended(made)
    card = page.done(made)
    card.get_by_role("button", name="Inpaint").click()
    page.paint()
    page.shot("brush")
    with page.tab.expect_response(lambda r: r.url.endswith("/edits")) as answer:
        page.tab.locator("#brush-yes").click()
    assert answer.value.status == 200, answer.value.text()
    page.done(answer.value.json()["id"])


def test_a_prompt_is_text_and_never_markup(page: Page) -> None:
    words = "<img src=x onerror=document.title=1> & more"
    made = page.service.create(prompt=words)["id"]
    card = page.done(made)
    assert card.locator(".words").inner_text() == words
    assert page.tab.title() == "sora_engine"


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_it_fits_narrow_and_wide_dark_and_light(
    browser: Any, service: Service, scheme: str
) -> None:
    made = service.create(prompt="a star " * 20, size="64x64")["id"]
    service.ended(made)
    page = Page(browser, service, color_scheme=scheme)
    page.tab.locator("#add-text").click()
    page.tab.locator("#loop").check()
    card = page.done(made)
    card.get_by_role("button", name="To the time line").click()
    letters = {}
    for width, height in ((320, 640), (1400, 900), (3840, 2160)):
        page.tab.set_viewport_size({"width": width, "height": height})
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
        letters[width] = page.tab.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")
        for name in ("Remix", "Inpaint") if width == 320 else ():
            card.get_by_role("button", name=name, exact=True).click()
            dialog = page.tab.locator("dialog[open]")
            box = dialog.bounding_box()
            assert box["x"] >= 0, (name, width)
            assert box["x"] + box["width"] <= width, (name, width)
            assert box["y"] + box["height"] <= height, (name, width)
            assert dialog.evaluate("one => one.scrollWidth <= one.clientWidth"), (name, width)
            page.tab.keyboard.press("Escape")
        page.shot(f"{scheme}-{width}")
    filled = page.tab.locator("main").evaluate("main => main.getBoundingClientRect().width")
    assert filled > 0.9 * 3840  # and is read from as far off as a smaller screen is
    assert letters == {320: 16, 1400: 16, 3840: 24}
    page.context.close()
    assert not page.wrong


def test_the_page_asks_for_a_key_where_there_is_one(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path, api_key="0123456789abcdef0123") as service:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(service.url)
        tab.get_by_label("Key", exact=True).fill("0123456789abcdef0123")
        tab.get_by_role("button", name="Enter").click()
        tab.locator("#key-dialog").wait_for(state="hidden")
        tab.locator("#no-gallery").wait_for()
        context.close()


def test_its_files_have_a_strict_policy_and_no_other_file_is_served(service: Service) -> None:
    for path in ("/", "/page/app.js", "/favicon.ico"):
        answer = service.http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    for path in ("/page/__init__.py", "/page/..%2fapp.py", "/page/none.js"):
        assert service.http.get(path).status_code == 404
