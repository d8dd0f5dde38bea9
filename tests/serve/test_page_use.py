"""The page by keyboard, by drag and for readers of screens; what it offers, and what it tells."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sora_engine.io.certificates import CERTIFICATE, KEY, make_certificates
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


def test_the_buttons_of_a_video_make_jobs(page: Page) -> None:
    draft = {"draft": True, "num_inference_steps": 4, "size": "64x64"}
    made = page.service.create(prompt="a star", **draft)["id"]
    page.service.ended(made)
    card = page.done(made)
    for name, path in (
        ("Remix", "/remix"),
        ("Extend before", "/extensions"),
        ("Edit", "/edits"),
        ("New frames", "/edits"),
        ("Upscale", "/upscale"),
        ("Refine", "/refine"),
    ):
        if name == "New frames":
            card.get_by_role("button", name=name).click()
            page.tab.locator("#ask [name=missing]").fill("2-3")
            with page.tab.expect_response(lambda r: r.url.endswith("/edits")) as answer:
                page.tab.locator("#ask-yes").click()
            job = answer.value.json()["id"]
        else:
            job = page.act(card, name, path)
        assert page.service.ended(job)["status"] == "completed", name
    card.get_by_role("button", name="Same again").click()
    sync_api.expect(page.tab.locator("#draft")).to_be_checked()
    assert page.tab.locator("#steps").input_value() == "4"
    with page.planned(lambda body: "timeline" in body) as asked:
        card.get_by_role("button", name="To the time line").click()
    (clip,) = asked.value.post_data_json["timeline"]["clips"]
    assert clip == {"video_id": made, "at": 0}
    assert page.tab.locator(".card.clip").evaluate("card => card === document.activeElement")


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_nothing_serious(browser: Any, service: Service, scheme: str) -> None:
    made = service.create(prompt="a green triangle", size="64x64")["id"]
    service.ended(made)
    page = Page(browser, service, color_scheme=scheme)
    page.fill("a red circle")
    page.tab.locator("#add-text").click()
    page.tab.get_by_role("button", name="Mute Text").click()
    page.tab.locator("#loop").check()
    card = page.done(made)
    card.get_by_text("How it was made").click()
    card.get_by_role("button", name="To the time line").click()
    page.tab.locator("#own").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": a_picture()}
    )
    own = page.tab.locator("#gallery .own")
    own.get_by_text("More to do with it").click()
    own.get_by_role("button", name="Connect", exact=True).click()
    page.sound()
    page.tab.locator("#pick-stop").click()
    for name in ("Remix", "Inpaint"):
        card.get_by_role("button", name=name, exact=True).click()
        page.tab.locator("dialog[open]").wait_for()
        page.sound()
        page.tab.keyboard.press("Escape")
    card.get_by_role("button", name="Delete").click()
    page.sound()
    page.context.close()
    assert not page.wrong


def a_picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), "teal").save(file, "png")
    return file.getvalue()


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
    assert page.service.ended(made["id"])["status"] == "completed"
    page.tab.locator(f"#gallery [data-id='{made['id']}']").wait_for()
    sync_api.expect(page.tab.locator("#make")).to_be_focused()
    page.tab_to(f"[data-id='{made['id']}'] .actions button:nth-child(2)")
    assert page.tab.evaluate("document.activeElement.textContent") == "Extend after"
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
    box, track = card.locator(".bar").bounding_box(), page.tab.locator("#track").bounding_box()
    page.drag(box["x"] + box["width"] / 2, box["y"] + 9, track["width"] / 2)
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
    with page.planned(lambda body: body["timeline"]["clips"][0]["at"] == 17) as asked:
        card.get_by_label("From frame").fill("17")
        page.tab.keyboard.press("Tab")
    (clip,) = asked.value.post_data_json["timeline"]["clips"]
    assert (clip["at"], clip["start"], clip["stop"]) == (17, 1, 6)
    with page.planned(lambda body: "timeline" not in body) as asked:
        card.get_by_role("button", name="Mute").click()
    assert asked.value
    card.get_by_role("button", name="Remove").click()
    assert card.count() == 0


def test_a_field_that_is_left_for_a_button_lets_it_be_pressed(page: Page) -> None:
    page.tab.get_by_role("button", name="Add text").click()
    card = page.tab.locator(".card.text")
    card.get_by_label("From frame").fill("9")
    card.get_by_role("button", name="Mute").click()
    sync_api.expect(card.get_by_role("button", name="Unmute")).to_be_visible()
    assert card.get_attribute("aria-label") == "Text at frame 9"
    card.get_by_label("From frame").fill("6")  # between two of the grid's
    page.tab.keyboard.press("Tab")
    assert card.get_by_label("From frame").input_value() in ("5", "9")
    assert page.tab.evaluate("document.activeElement.textContent") == "Unmute"


@pytest.mark.parametrize(
    "address", ["#%", '#{"cards":[null,{"kind":"x"}],"prompt":"a star"}', "#7"]
)
def test_an_address_of_something_else_opens_the_page(page: Page, address: str) -> None:
    page.tab.evaluate("localStorage.clear()")
    page.tab.goto("about:blank")
    page.tab.goto(page.service.url + "/" + address)
    sync_api.expect(page.tab.locator("#model")).not_to_be_empty()
    sync_api.expect(page.tab.locator("#seed")).not_to_have_value("")
    assert page.tab.locator(".card").count() == 0
    wanted = "a star" if "star" in address else ""
    assert page.tab.get_by_label("Prompt").first.input_value() == wanted


def test_a_result_says_who_signed_it_and_what_it_was_made_from(
    browser: Any, service: Service, tmp_path: Path
) -> None:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    own = make_certificates(tmp_path / "own", "A Service")
    signing = {"sign_cert": own / CERTIFICATE, "sign_key": own / KEY}
    with served(tmp_path / "data", **signing) as signer, opened(browser, signer) as page:
        first = signer.create(num_inference_steps=1)["id"]
        signer.ended(first)
        body = {"video": {"video_id": first}, "seconds": 0.5, "num_inference_steps": 1}
        longer = signer.http.post("/v1/videos/extensions", json=body).json()["id"]
        for name, words in (
            (first, "since."),
            (longer, "since; made from a clip signed by A Service."),
        ):
            card = page.done(name)
            card.get_by_text("How it was made").click()
            told = card.locator(".signed")
            sync_api.expect(told).to_contain_text(f"Signed by A Service, and unaltered {words}")
            sync_api.expect(card.locator("pre")).to_contain_text('"credentials"')
        page.shot("signed")
    unsigned = service.create(num_inference_steps=1)["id"]
    service.ended(unsigned)
    with opened(browser, service) as page:
        card = page.done(unsigned)
        card.get_by_text("How it was made").click()
        sync_api.expect(card.locator(".signed")).to_contain_text("Not signed")


def test_what_the_model_has_is_offered_and_asked_for(browser: Any, service: Service) -> None:
    page = Page(browser, service)
    for name in ("#ladder", "#guidance2", "#label", "#loras"):
        assert not page.tab.locator(name).is_visible()

    def richer(route: Any) -> None:
        told = route.fetch().json()
        extra = {"loras": ["ink", "oil"], "ladders": ["fast-4", "own-8"], "experts": 2}
        told["data"][0]["sora"] |= {**extra, "labels": {"count": 2, "names": {"owl": 1}}}
        told["data"][0]["sora"]["defaults"]["ladder"] = "own-8"
        route.fulfill(json=told)

    page.tab.route("**/v1/models", richer)
    page.tab.route("**/v1/videos/plan", lambda route: route.fulfill(json={"num_steps": 4}))
    page.tab.reload()
    page.fill("a red circle", guidance2="2", label="owl")
    offered = page.tab.locator("#ladder option").all_inner_texts()
    assert offered == ["the model's (own-8)", "fast-4", "none, any number of steps"]
    with page.planned(lambda body: body.get("ladder") == ""):
        page.tab.locator("#ladder").select_option(label=offered[2])
    page.tab.locator("#ladder").select_option("fast-4")
    page.tab.get_by_label("ink", exact=True).check()
    with page.planned(lambda body: body["loras"] and body["loras"][0]["strength"] == 0.5) as asked:
        page.tab.get_by_label("Strength of ink").fill("0.5")
        page.tab.keyboard.press("Tab")
    body = asked.value.post_data_json
    assert body["loras"] == [{"name": "ink", "strength": 0.5}]
    assert (body["ladder"], body["guidance_scale_2"], body["label"]) == ("fast-4", 2, "owl")
    page.tab.reload()
    assert page.tab.get_by_label("Strength of ink").input_value() == "0.5"
    page.context.close()
    assert not page.wrong


def test_a_model_of_pictures_offers_one_frame(page: Page) -> None:
    def pictures(route: Any) -> None:
        told = route.fetch().json()
        told["data"][0]["sora"]["grid"]["images"] = True
        route.fulfill(json=told)

    page.tab.route("**/v1/models", pictures)
    page.tab.evaluate("localStorage.clear()")
    page.tab.goto("about:blank")
    page.tab.goto(page.service.url)
    page.tab.locator("#model:not(:empty)").wait_for()
    assert page.tab.locator("#length option").all_inner_texts() == ["1 frame (a picture)"]


def test_a_page_that_comes_before_the_model_opens_once_it_is_there(page: Page) -> None:
    left = [1]

    def late(route: Any) -> None:
        if left:
            left.pop()
            route.fulfill(status=503, json={"error": {"message": "the model is being loaded"}})
        else:
            route.continue_()

    page.tab.route("**/v1/models", late)
    page.tab.reload()
    sync_api.expect(page.tab.locator("#problem")).to_contain_text("is being loaded")
    page.tab.locator("#model:not(:empty)").wait_for()
    sync_api.expect(page.tab.locator("#problem")).to_be_empty()
    page.wrong.clear()  # the 503


def test_a_failed_job_and_servers_that_do_not_answer_are_told(page: Page) -> None:
    made = page.service.create(prompt="a star")["id"]
    page.service.ended(made)
    page.fill("a red circle")
    page.service.desk.is_full = lambda: True
    page.tab.locator("#make").click()
    problem = page.tab.locator("#problem")
    sync_api.expect(problem).to_contain_text("disk")
    page.tab.locator("#plan:not(:empty)").wait_for()
    assert "disk" in problem.inner_text()  # a plan that succeeds does not hide it
    del page.service.desk.is_full
    page.wrong.clear()  # the 503

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
