"""The page in a real browser, for tests: Debian's Chromium, driven by Playwright.

A module that imports this is skipped where one of them is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.serving import Service

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


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


class Page:
    """A tab on the page, and what went wrong in it."""

    def __init__(
        self, browser: Any, service: Service, *, clock: bool = False, **options: Any
    ) -> None:
        """clock: the page's time can be made to pass."""
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
        if clock:
            self.tab.clock.install()
        self.tab.route(_WORKED_ON, _in_four_steps)
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
        self.tab.locator("#size").select_option("32x32")
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
        if not card.get_by_role("button", name="Delete").is_visible():
            card.get_by_text("More to do with it").click()
        return card

    def act(self, card: Any, name: str, path: str) -> str:
        """Presses a button of a card and answers its dialog; the new job's id."""
        card.get_by_role("button", name=name, exact=True).click()
        if self.tab.locator("#ask [name=seconds]").count():
            self.tab.locator("#ask [name=seconds]").fill("0.5")
        with self.tab.expect_response(lambda r: r.url.endswith(path)) as answer:
            self.tab.locator("#ask-yes").click()
        assert answer.value.status == 200, answer.value.text()
        return str(answer.value.json()["id"])

    def paint(self) -> None:
        """Draws a short line with the brush, in the last quarter of the picture."""
        box = self.tab.locator("#brush-canvas").bounding_box()
        x, y = box["x"] + 0.7 * box["width"], box["y"] + 0.7 * box["height"]
        self.drag(x, y, box["width"] / 8, box["height"] / 8)

    def drag(self, x: float, y: float, across: float, down: float = 0.0) -> None:
        """Presses at a point, and lets go that far from it."""
        self.tab.mouse.move(x, y)
        self.tab.mouse.down()
        self.tab.mouse.move(x + across, y + down, steps=4)
        self.tab.mouse.up()

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

    def planned(self, wanted: Callable[[dict[str, Any]], bool]) -> Any:
        """Expects that the page asks for the plan of a body like that."""
        return self.tab.expect_request(
            lambda r: r.url.endswith("/plan") and wanted(r.post_data_json)
        )

    def shot(self, name: str) -> None:
        if SHOTS:
            self.tab.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


_WORKED_ON = re.compile(r"/v1/videos/(extensions|connect|edits|loop|upscale|[^/]+/refine)$")


def _in_four_steps(route: Any) -> None:
    """What is made of a video has the model's own number of steps, for which tests do not wait."""
    body = {**route.request.post_data_json, "num_inference_steps": 4}
    route.continue_(post_data=json.dumps(body))


@contextlib.contextmanager
def opened(browser: Any, service: Service, **options: Any) -> Iterator[Page]:
    """A tab in which nothing went wrong, and a service that is idle after it."""
    page = Page(browser, service, **options)
    yield page
    page.context.close()
    service.idle()
    assert not page.wrong
