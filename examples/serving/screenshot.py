"""Takes the picture of the page that the README shows: a server of its own, a browser, a file.

    python examples/serving/screenshot.py docs/pictures/page.webp

It needs playwright and a chromium on the PATH.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

PROMPTS = (
    "a large green square bounces on a black background",
    "a large blue star orbits on a yellow background",
    "a large red circle moves right on a white background",
)
LINE = (
    ("Prompt", "a large purple diamond moves up on a gray background"),
    ("Words", "a large white star moves left on a green background"),
)
MOST_BYTES = 200_000


def main(target: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("there is no chromium on the PATH")
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "sora_engine", "serve", "--port", "0", "--data-dir", data]
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            picture = taken(chromium, address_of(server))
        finally:
            server.terminate()
            server.wait()
    Image.open(io.BytesIO(picture)).convert("RGB").save(target, quality=82, method=6)
    if target.stat().st_size > MOST_BYTES:
        sys.exit(f"{target} has {target.stat().st_size} bytes, and {MOST_BYTES} are the most")


def address_of(server: subprocess.Popen[str]) -> str:
    """Where the server listens, once it is ready."""
    url = ""
    assert server.stdout is not None
    for line in server.stdout:
        if "listening on " in line:
            url = line.split("listening on ")[1].strip()
        if "ready;" in line:
            return url
    sys.exit("the server did not start")


def taken(chromium: str, url: str) -> bytes:
    """A PNG: three videos are there, and one is being made."""
    with httpx.Client(base_url=url, timeout=60) as http:
        for seed, prompt in enumerate(PROMPTS):
            name = http.post("/v1/videos", json={"prompt": prompt, "seed": seed}).json()["id"]
            while (state := http.get(f"/v1/videos/{name}").json()["status"]) != "completed":
                if state == "failed":
                    sys.exit("a video failed")
                time.sleep(0.2)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1440, "height": 940})
        tab.goto(url)
        tab.locator("#add-text").click()
        for label, words in LINE:
            tab.get_by_label(label).first.fill(words)
        tab.keyboard.press("Tab")
        tab.get_by_text("More settings").click()
        tab.locator("#steps").fill("200")
        tab.get_by_text("More settings").click()
        tab.locator("#seed").fill("7")
        tab.get_by_role("button", name="Make", exact=True).click()
        tab.wait_for_selector("#queue img:not([hidden])")
        while tab.locator("#queue progress").evaluate("bar => bar.value") < 60:
            tab.wait_for_timeout(50)
        picture = bytes(tab.screenshot())
        browser.close()
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
