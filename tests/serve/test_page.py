"""The page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.serving import Service, served

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium here", allow_module_level=True)

SHOTS = os.environ.get("SORA_PAGE_SHOTS")
"""A folder for screenshots, for people to look at."""
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data")) as service:
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


class Page:
    """A tab on the page, and what went wrong in it."""

    def __init__(self, browser: Any, service: Service, **options: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1100, "height": 900}, **options}
        )
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(20_000)
        self.wrong: list[str] = []
        self.service = service
        self.tab.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.tab.on("console", self._heard)
        self.tab.on("request", self._asked)
        self.tab.goto(service.url)
        sync_api.expect(self.tab.locator("#model")).not_to_be_empty()

    def _heard(self, message: Any) -> None:
        # What has no preview any more answers 404, which Chromium writes as an error.
        if message.type == "error" and "/preview" not in str(message.location):
            self.wrong.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.service.url, "blob:")):
            self.wrong.append(f"asked {request.url}")

    def fill(self, prompt: str, **fields: str) -> None:
        self.tab.get_by_label("Prompt").first.fill(prompt)
        self.tab.locator("#length").select_option("5")
        self.tab.get_by_text("More settings").click()
        for name, value in fields.items():
            self.tab.locator(f"#{name}").fill(value)

    def make(self) -> str:
        """Presses Make; the job's id."""
        with self.tab.expect_response(lambda r: r.url.endswith("/v1/videos")) as answer:
            self.tab.get_by_role("button", name="Make", exact=True).click()
        assert answer.value.status == 200, answer.value.text()
        return str(answer.value.json()["id"])

    def done(self, name: str) -> Any:
        """The video's card, once it is finished and plays."""
        assert self.service.ended(name)["status"] == "completed", self.service.ended(name)
        card = self.tab.locator(f"#gallery [data-id='{name}']")
        card.wait_for()
        film = card.locator("video")
        until = time.monotonic() + 20
        while film.evaluate("film => film.readyState") < 2:
            assert time.monotonic() < until, "the video does not play"
            time.sleep(0.05)
        return card

    def act(self, card: Any, name: str, path: str) -> str:
        """Presses a button of a card and answers its dialog; the new job's id."""
        card.get_by_role("button", name=name, exact=True).click()
        if self.tab.locator("#ask [name=seconds]").count():
            self.tab.locator("#ask [name=seconds]").fill("0.5")
        with self.tab.expect_response(
            lambda r: r.request.method == "POST" and path in r.url
        ) as answer:
            self.tab.locator("#ask-yes").click()
        assert answer.value.status == 200, answer.value.text()
        return str(answer.value.json()["id"])

    def tab_to(self, wanted: str) -> None:
        """Presses Tab until what a selector names has the focus."""
        for _ in range(60):
            if self.tab.evaluate("wanted => document.activeElement.matches(wanted)", wanted):
                return
            self.tab.keyboard.press("Tab")
        raise AssertionError(f"{wanted} is not reached")

    def sound(self) -> None:
        """Axe finds nothing serious."""
        found = axe.Axe().run(self.tab).response["violations"]
        told = [
            f"{one['id']}: {node['html'][:120]}: {node['failureSummary']}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]
        assert not told, "\n".join(told)

    def shot(self, name: str) -> None:
        if SHOTS:
            self.tab.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


@pytest.fixture
def page(browser: Any, service: Service) -> Iterator[Page]:
    page = Page(browser, service)
    yield page
    wrong = page.wrong
    page.context.close()
    service.idle()
    assert not wrong


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


def test_a_region_is_painted_and_made_anew(page: Page) -> None:
    made = page.service.create(prompt="a green triangle", size="64x64")["id"]
    page.service.ended(made)
    card = page.done(made)
    card.get_by_role("button", name="Inpaint").click()
    canvas = page.tab.locator("#brush-canvas")
    box = canvas.bounding_box()
    page.tab.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 3)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.tab.mouse.up()
    page.shot("brush")
    with page.tab.expect_response(lambda r: r.url.endswith("/edits")) as answer:
        page.tab.locator("#brush").get_by_role("button", name="Make").click()
    assert answer.value.status == 200, answer.value.text()
    page.done(answer.value.json()["id"])


def test_a_prompt_is_text_and_never_markup(page: Page) -> None:
    words = "<img src=x onerror=document.title=1> & more"
    made = page.service.create(prompt=words)["id"]
    card = page.done(made)
    assert card.locator(".words").inner_text() == words
    assert page.tab.title() == "sora_engine"


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [380, 1400])
def test_it_fits_narrow_and_wide_dark_and_light(
    browser: Any, service: Service, scheme: str, width: int
) -> None:
    page = Page(browser, service, color_scheme=scheme, viewport={"width": width, "height": 900})
    page.tab.locator("#add-text").click()
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    page.shot(f"{scheme}-{width}")
    page.context.close()
    assert not page.wrong


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_nothing_serious(browser: Any, service: Service, scheme: str) -> None:
    made = service.create(prompt="a green triangle", size="64x64")["id"]
    service.ended(made)
    page = Page(browser, service, color_scheme=scheme)
    page.fill("a red circle")
    page.tab.locator("#add-text").click()
    page.tab.get_by_role("button", name="Mute Text").click()
    card = page.done(made)
    card.get_by_text("How it was made").click()
    page.sound()
    for name in ("Extend after", "Inpaint"):
        card.get_by_role("button", name=name, exact=True).click()
        page.tab.locator("dialog[open]").wait_for()
        page.sound()
        page.tab.keyboard.press("Escape")
    page.context.close()
    assert not page.wrong


def test_a_video_is_made_and_extended_by_keyboard_alone(page: Page) -> None:
    keys = page.tab.keyboard
    page.tab_to("#prompt")
    keys.type("a red circle grows")
    page.tab_to("#length")
    keys.type("5 frames")
    page.tab_to("summary")
    keys.press("Enter")
    page.tab_to("#steps")
    keys.type("2")
    page.tab_to("#make")
    with page.tab.expect_response(lambda r: r.url.endswith("/v1/videos")) as answer:
        keys.press("Enter")
    made = answer.value.json()
    assert (made["prompt"], made["num_frames"]) == ("a red circle grows", 5)
    page.done(made["id"])
    page.tab_to(f"[data-id='{made['id']}'] .actions button:nth-child(2)")
    keys.press("Enter")
    page.tab_to("#ask [name=seconds]")
    keys.press("Control+A")
    keys.type("0.5")
    page.tab_to("#ask-yes")
    with page.tab.expect_response(lambda r: r.url.endswith("/extensions")) as answer:
        keys.press("Enter")
    page.done(answer.value.json()["id"])
    assert page.service.ended(answer.value.json()["id"])["num_frames"] > 5


def test_a_clip_is_dragged_placed_by_number_trimmed_muted_and_removed(page: Page) -> None:
    made = page.service.create(prompt="a star", num_frames=9)["id"]
    page.service.ended(made)
    film = page.service.http.get(f"/v1/videos/{made}/content").content
    page.fill("a red circle", steps="2")
    page.tab.locator("#length").select_option("33")
    page.tab.locator("#file").set_input_files(
        {"name": "a.mp4", "mimeType": "video/mp4", "buffer": film}
    )
    card = page.tab.locator(".card.clip")
    card.wait_for()
    box, track = card.bounding_box(), page.tab.locator("#track").bounding_box()
    page.tab.mouse.move(box["x"] + 12, box["y"] + box["height"] / 2)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + 12 + track["width"] / 2, box["y"] + 9, steps=5)
    page.tab.mouse.up()
    dragged = int(card.get_by_label("From frame").input_value())
    assert 13 <= dragged <= 20
    assert card.get_attribute("aria-label") == f"Clip at frame {dragged}"
    for name, value in (
        ("From frame", "9"),
        ("First frame of the clip", "1"),
        ("Frame after its last", "6"),
    ):
        card.get_by_label(name).fill(value)
        page.tab.keyboard.press("Tab")
    with page.tab.expect_request(lambda r: r.url.endswith("/plan")) as asked:
        card.get_by_label("From frame").fill("17")
        page.tab.keyboard.press("Tab")
    (clip,) = asked.value.post_data_json["timeline"]["clips"]
    assert (clip["at"], clip["start"], clip["stop"]) == (17, 1, 6)
    with page.tab.expect_request(lambda r: r.url.endswith("/plan")) as asked:
        card.get_by_role("button", name="Mute").click()
    assert "timeline" not in asked.value.post_data_json
    card.get_by_role("button", name="Remove").click()
    assert card.count() == 0


def test_what_the_model_has_is_offered_and_asked_for(browser: Any, service: Service) -> None:
    page = Page(browser, service)
    for name in ("#ladder", "#guidance2", "#label", "#loras"):
        assert not page.tab.locator(name).is_visible()

    def richer(route: Any) -> None:
        told = route.fetch().json()
        extra = {"loras": ["ink", "oil"], "ladders": ["fast-4"], "experts": 2}
        told["data"][0]["sora"] |= {**extra, "labels": {"count": 2, "names": {"owl": 1}}}
        route.fulfill(json=told)

    page.tab.route("**/v1/models", richer)
    page.tab.route("**/v1/videos/plan", lambda route: route.fulfill(json={"num_steps": 4}))
    page.tab.reload()
    page.fill("a red circle", guidance2="2", label="owl")
    page.tab.locator("#ladder").select_option("fast-4")
    page.tab.get_by_label("ink", exact=True).check()
    with page.tab.expect_request(lambda r: r.url.endswith("/plan")) as asked:
        page.tab.get_by_label("Strength of ink").fill("0.5")
        page.tab.keyboard.press("Tab")
    body = asked.value.post_data_json
    assert body["loras"] == [{"name": "ink", "strength": 0.5}]
    assert (body["ladder"], body["guidance_scale_2"], body["label"]) == ("fast-4", 2, "owl")
    page.tab.reload()
    assert page.tab.get_by_label("Strength of ink").input_value() == "0.5"
    page.context.close()
    assert not page.wrong


def test_a_failed_job_and_servers_that_do_not_answer_are_told(page: Page) -> None:
    made = page.service.create(prompt="a star")["id"]
    page.service.ended(made)

    def worse(route: Any) -> None:
        told = route.fetch().json()
        error = {"code": "memory", "message": "no memory is left"}
        told["data"][0] |= {"id": "video_failed", "status": "failed", "error": error}
        route.fulfill(json={**told, "missing_replicas": ["b"]})

    page.tab.route("**/v1/videos?*", worse)
    page.tab.reload()
    failed = page.tab.locator("#gallery [data-id=video_failed]")
    sync_api.expect(failed).to_contain_text("It failed: no memory is left")
    assert failed.get_by_role("button").all_inner_texts() == ["Same again", "Delete"]
    sync_api.expect(page.tab.locator("#link")).to_contain_text("no answer from server b")


def test_a_job_that_waits_is_put_first(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path, max_running=1, max_priority=1) as service:
        long = service.create(num_inference_steps=200, num_frames=33)["id"]
        names = [service.create(prompt=words)["id"] for words in ("a star", "a square")]
        page = Page(browser, service)
        job = page.tab.locator(f"#queue [data-id='{names[1]}']")
        job.get_by_role("button", name="Sooner").click()
        sync_api.expect(job).to_contain_text("priority 1")
        sync_api.expect(job.get_by_role("button", name="Sooner")).to_be_disabled()
        sync_api.expect(page.tab.locator("#queue li").nth(1)).to_have_attribute("data-id", names[1])
        page.shot("queue")
        service.http.post(f"/v1/videos/{long}/cancel")
        service.idle()
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
