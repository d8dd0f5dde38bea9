"""What the page does with videos and with files of the reader's own, and how it tells of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.browsers import Page, chromium, opened, sync_api
from tests.serve.serving import Service, served

expect = sync_api.expect


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data")) as service:
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def made(service: Service) -> str:
    """A draft of 17 frames that is done, as two others are: the server knows how long it takes."""
    names = [service.create(draft=True, num_frames=17, size="64x64")["id"] for _ in range(3)]
    for name in names:
        service.ended(name)
    return str(names[0])


@pytest.fixture
def page(browser: Any, service: Service) -> Iterator[Page]:
    with opened(browser, service) as page:
        yield page


@pytest.fixture
def timed(browser: Any, service: Service) -> Iterator[Page]:
    """A page whose time can be made to pass."""
    with opened(browser, service, clock=True) as page:
        yield page


def pressed(page: Page, card: Any, name: str) -> None:
    card.get_by_role("button", name=name, exact=True).click()
    page.tab.locator("dialog[open]").wait_for()


def stored(service: Service, name: str) -> dict[str, Any]:
    """A request without its id, and without an empty list of adapters."""
    told = service.http.get(f"/v1/videos/{name}/request").json()
    told["fields"] = {key: value for key, value in told["fields"].items() if value != []}
    return {key: value for key, value in told.items() if key not in ("id", "object")}


def test_a_loop_joins_the_ends_of_the_ruler(page: Page) -> None:
    join, ruler = page.tab.locator("#join"), page.tab.locator("#ruler")
    assert not join.is_visible()
    page.tab.locator("#loop").check()
    assert join.is_visible()
    bow, line = join.bounding_box(), ruler.bounding_box()
    assert bow["x"] == pytest.approx(line["x"], abs=1)
    assert bow["width"] == pytest.approx(line["width"], abs=1)
    assert bow["y"] + bow["height"] < line["y"] + line["height"]
    labels = ruler.locator("b")  # the end is the moment at which it begins
    assert labels.first.inner_text() == labels.last.inner_text() == "0 s"
    last = labels.last.bounding_box()
    assert last["x"] + last["width"] == pytest.approx(line["x"] + line["width"], abs=2)
    page.tab.locator("#loop").uncheck()
    assert not join.is_visible()


def test_a_clip_is_trimmed_by_its_ends(page: Page, made: str) -> None:
    page.tab.get_by_label("Prompt").first.fill("a star")
    page.tab.locator("#length").select_option("33")
    page.done(made).get_by_role("button", name="To the time line").click()
    card, ruler = page.tab.locator(".card.clip"), page.tab.locator("#ruler").bounding_box()
    bar = card.locator(".bar")

    def fields() -> tuple[int, ...]:
        names = ("From frame", "First frame of the clip", "Frame after its last")
        at, start, stop = (int(card.get_by_label(name).input_value()) for name in names)
        box = bar.bounding_box()
        assert box["x"] - ruler["x"] == pytest.approx(ruler["width"] * at / 33, abs=2)
        assert box["width"] == pytest.approx(ruler["width"] * (stop - start) / 33, abs=2)
        return at, start, stop

    def pull(name: str, frames: float) -> None:
        box = card.get_by_role("slider", name=name).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.drag(x, y, frames * ruler["width"] / 33)

    assert fields() == (0, 0, 17)
    pull("Trim its end", -7.6)
    assert fields() == (0, 0, 9)
    with page.planned(lambda body: body["timeline"]["clips"][0].get("start") == 5) as asked:
        pull("Trim its beginning", 4.7)
    assert fields() == (5, 5, 9)
    (clip,) = asked.value.post_data_json["timeline"]["clips"]
    assert clip == {"video_id": made, "at": 5, "start": 5, "stop": 9}
    end = card.get_by_role("slider", name="Trim its end")
    end.focus()
    page.tab.keyboard.press("ArrowRight")
    assert fields() == (5, 5, 13)
    assert end.get_attribute("aria-valuenow") == "13"
    page.tab.keyboard.press("Shift+ArrowRight")  # it has no more frames
    assert fields() == (5, 5, 17)
    card.get_by_role("slider", name="Trim its beginning").focus()
    page.tab.keyboard.press("ArrowLeft")
    assert fields() == (1, 1, 17)
    pull("Trim its beginning", -20)
    assert fields() == (0, 0, 17)


def test_dialogs_tell_what_a_work_would_take(page: Page, made: str) -> None:
    card, plan = page.done(made), page.tab.locator("#ask-plan")
    before = len(page.service.http.get("/v1/videos?limit=100").json()["data"])
    for name in ("Remix", "Extend after", "Loop", "Upscale"):
        pressed(page, card, name)
        expect(plan).to_contain_text("MiB of memory promised, about")
        if name == "Extend after":
            longer = {"video": {"video_id": made}, "seconds": 2, "size": "32x32"}
            told = page.service.http.post("/v1/videos/extensions/plan", json=longer).json()
            page.tab.locator("#ask [name=seconds]").fill("2")
            words = f"{told['size']}, {float(told['seconds']):.1f} s, {told['num_steps']} steps"
            expect(plan).to_contain_text(words)
        page.tab.keyboard.press("Escape")
    pressed(page, card, "New frames")
    page.tab.locator("#ask [name=missing]").fill("40-50")
    page.tab.locator("#ask-yes").click()
    expect(page.tab.locator("#ask-problem")).to_contain_text("40")  # and it stays open
    page.tab.keyboard.press("Escape")
    pressed(page, card, "Inpaint")
    expect(page.tab.locator("#brush-plan")).to_contain_text("MiB of memory promised, about")
    page.tab.keyboard.press("Escape")
    card.get_by_role("button", name="Connect", exact=True).click()
    assert not card.get_by_role("button", name="This one follows").is_visible()
    page.tab.get_by_role("button", name="This one follows").first.click()
    expect(plan).to_contain_text("MiB of memory promised, about")
    page.tab.keyboard.press("Escape")
    assert len(page.service.http.get("/v1/videos?limit=100").json()["data"]) == before
    page.wrong.clear()  # the 400


def test_the_same_again_has_its_clips_and_its_task(page: Page, made: str) -> None:
    clips = [{"video_id": made, "at": 0, "start": 1, "stop": 5}]
    clips += [{"video_id": made, "at": 8, "stop": 1}]
    shots = [{"prompt": "a red star", "num_frames": 4}, {"prompt": "a blue star", "num_frames": 12}]
    line = {"clips": clips, "shots": shots, "loop": True}
    first = page.service.create(prompt="a red star", num_frames=16, timeline=line)["id"]
    page.done(first).get_by_role("button", name="Same again").click()
    expect(page.tab.locator(".card")).to_have_count(3)
    expect(page.tab.locator("#loop")).to_be_checked()
    assert stored(page.service, page.make()) == stored(page.service, first)

    body = {"video": {"video_id": made}, "prompt": "a star", "before_s": 0.5}
    longer = {**body, "num_inference_steps": 2, "size": "32x32"}
    second = page.service.http.post("/v1/videos/extensions", json=longer).json()["id"]
    card = page.done(second)
    assert stored(page.service, page.act(card, "Same again", "/again")) == stored(
        page.service, second
    )


def test_a_remix_is_as_far_off_as_it_is_asked_to_be(page: Page, made: str) -> None:
    card = page.done(made)
    pressed(page, card, "Remix")
    page.tab.get_by_label("How much changes").fill("0.85")
    expect(page.tab.locator("#ask output")).to_have_text("0.85")
    with page.tab.expect_response(lambda r: r.url.endswith("/remix")) as answer:
        page.tab.locator("#ask-yes").click()
    told = answer.value.json()
    assert stored(page.service, told["id"])["over"]["strength"] == 0.85
    page.service.http.post(f"/v1/videos/{told['id']}/cancel")


def test_a_file_of_ones_own_is_edited_and_inpainted(page: Page, made: str) -> None:
    film = page.service.http.get(f"/v1/videos/{made}/content").content
    file = {"name": "holiday.mp4", "mimeType": "video/mp4", "buffer": film}
    page.tab.locator("#own").set_input_files(file)
    card = page.tab.locator("#gallery .own")
    expect(card).to_contain_text("holiday.mp4")
    pressed(page, card, "Edit")
    page.tab.locator("#ask [name=prompt]").fill("a blue star")
    expect(page.tab.locator("#ask-plan")).to_contain_text("of memory promised")
    with page.tab.expect_response(lambda r: r.url.endswith("/edits")) as answer:
        page.tab.locator("#ask-yes").click()
    edited = answer.value.json()["id"]
    assert page.service.ended(edited)["status"] == "completed"
    assert stored(page.service, edited)["fields"]["strength"] == 0.6
    pressed(page, card, "Inpaint")
    page.tab.locator("#brush-prompt").fill("a green star")
    page.tab.locator("#brush-yes").click()
    problem = page.tab.locator("#brush-problem")
    expect(problem).to_contain_text("nothing is painted")
    assert page.tab.locator("#brush").is_visible()
    page.paint()
    expect(problem).to_be_empty()
    page.tab.locator("#brush-clear").click()
    page.tab.locator("#brush-yes").click()
    expect(problem).to_contain_text("nothing is painted")
    page.paint()
    with page.tab.expect_response(lambda r: r.url.endswith("/edits")) as answer:
        page.tab.locator("#brush-yes").click()
    inpainted = answer.value.json()["id"]
    assert page.service.ended(inpainted)["status"] == "completed"
    fields = stored(page.service, inpainted)["fields"]
    assert set(fields["video"]) == set(fields["mask"]) == {"upload"}
    card.get_by_text("More to do with it").click()
    card.get_by_role("button", name="Take away").click()
    assert not card.count()


def test_the_head_of_the_page_tells_how_things_stand(timed: Page) -> None:
    page = timed
    status = page.tab.locator("#status")
    page.fill("a red star", steps="2")
    name = page.make()
    page.done(name)
    expect(status).to_have_text("done: a red star")
    page.tab.clock.fast_forward(10_000)
    expect(status).to_be_empty()
    page.tab.locator("#steps").fill("150")
    name = page.make()
    page.tab.clock.fast_forward(10_000)
    expect(status).to_contain_text("step")
    page.service.http.delete(f"/v1/videos/{name}")  # elsewhere: nothing is told of it
    page.tab.clock.fast_forward(4_000)
    expect(status).to_be_empty()
    page.wrong.clear()  # its stream's 404


def test_a_deletion_can_be_taken_back(timed: Page) -> None:
    page = timed
    names = [page.service.create(prompt=f"star {n}", num_inference_steps=1)["id"] for n in (1, 2)]
    cards = [page.done(name) for name in names]

    def status(n: int) -> int:
        return page.service.http.get(f"/v1/videos/{names[n]}").status_code

    cards[0].get_by_role("button", name="Delete").click()
    undo = page.tab.get_by_role("button", name="Undo")
    expect(undo).to_be_focused()
    assert page.tab.get_by_text("Deleted: star 1").is_visible()
    page.tab.clock.fast_forward(15_000)
    page.tab.keyboard.press("Enter")
    expect(cards[0]).to_be_visible()
    page.tab.clock.fast_forward(25_000)
    assert status(0) == 200
    cards[0].get_by_role("button", name="Delete").click()
    with page.tab.expect_response(lambda r: r.request.method == "DELETE"):
        page.tab.clock.fast_forward(21_000)
    assert status(0) == 404
    cards[1].get_by_role("button", name="Delete").click()
    page.tab.reload()  # who leaves has made up their mind
    page.tab.locator("#model:not(:empty)").wait_for()
    expect(page.tab.locator(f"[data-id='{names[1]}']")).to_have_count(0)
    assert status(1) == 404
