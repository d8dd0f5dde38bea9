"""`sora play` by its parts: scripts and recordings, errors, the screen, keys, a player."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

import sora_engine as sora
from sora_engine.cli import main
from sora_engine.cli.play import script
from sora_engine.cli.play.feed import Feed
from sora_engine.cli.play.hands import Hands, bindings, help_line
from sora_engine.cli.play.keyboard import SPEAKS, Act, Key, Keyboard
from sora_engine.cli.play.player import Player, unused
from sora_engine.cli.play.screen import Layout, Screen, cut
from sora_engine.io.video_reader import read_video
from sora_engine.request import Action
from sora_engine.request.actions import ActionSpace
from tests.unit.glass import Glass, lines_of, pixels_of
from tests.unit.world_folder import save_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_world(tmp_path_factory.mktemp("world")))


# Scripts.


def test_a_script_is_what_a_session_does_and_plays_again_to_the_same_file(
    tmp_path: Path, world: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made, again = tmp_path / "made.mp4", tmp_path / "again.mp4"
    play = ["play", "--model", world, "--seed", "3"]
    assert main([*play, "--actions", "right*3 act left+up still", "-o", str(made)]) == 0
    told = capsys.readouterr().out
    assert "step 6/6" in told
    assert f"{made}: 6 steps, 24 frames, seed 3" in told
    assert main(["play", "--model", world, "--replay", str(made), "-o", str(again)]) == 0
    assert f"{again}: 24 frames of {made} again" in capsys.readouterr().out
    assert made.read_bytes() == again.read_bytes()
    # The same through the API, and what the file shows is what was made.
    with sora.Engine.from_pretrained(world) as engine:
        again = np.concatenate(list(engine.replay(made)))
        with engine.open_session(sora.SessionRequest(seed=3)) as session:
            each = session.actions.parse("right*3 act left+up still")
            frames = np.concatenate([session.step(action) for action in each])
    assert again.tobytes() == frames.tobytes()
    shown, fps = read_video(made)
    assert (len(shown), fps) == (24, 16)
    assert np.abs(shown.astype(int) - frames).mean() < 12  # mp4 loses some


def test_a_policy_does_what_its_seed_says(
    tmp_path: Path, world: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "random.mp4"
    options = ["--policy", "random", "--steps", "5", "--seed", "9", "-o", str(made)]
    assert main(["play", "--model", world, *options]) == 0
    assert "5 steps, 20 frames, seed 9" in capsys.readouterr().out
    space = ActionSpace(("up", "down", "left", "right", "act"))
    chosen = list(itertools.islice(script.at_random(space, 9), 400))
    assert chosen == list(itertools.islice(script.at_random(space, 9), 400))
    assert chosen != list(itertools.islice(script.at_random(space, 8), 400))
    counts = {action: chosen.count(action) for action in set(chosen)}
    assert set(counts) == {Action(), *map(Action, space.buttons)}
    assert min(counts.values()) > 400 / 6 / 2
    with sora.Engine.from_pretrained(world) as engine:
        with engine.open_session(sora.SessionRequest(seed=9)) as session:
            frames = [session.step(action) for action in chosen[:5]]
        assert np.array_equal(np.concatenate(frames), np.concatenate(list(engine.replay(made))))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--actions", "rihgt*3"], "--actions: button 'rihgt' is not known; the nearest is 'righ"),
        (["--actions", "right*x"], "'right*x' is to be done 'x' times; a number from 1"),
        (["--actions", " "], "--actions: nothing is to be done; right*8 would work"),
        (["--policy", "clever"], "--policy: 'clever' is none; random or still would work"),
        (["--policy", "still", "--actions", "up"], "--actions and --policy are two ways to play"),
        (["--actions", "up", "-o", "a.gif"], "--output: a.gif must end in .mp4"),
        (["--actions", "up", "-o", "nowhere/a.mp4"], "--output: "),
        (["--replay", "absent.mp4", "-o", "a.mp4"], "--replay: "),
        (["--actions", "up", "--first", "absent.png"], "--first: absent.png"),
        (["--actions", "up", "--size", "30x"], "--size: '30x' is not WIDTHxHEIGHT"),
        (["--actions", "up", "--denoising", "0"], "num_inference_steps must be from 1"),
        ([], "sora play needs a terminal, and standard input is none; --actions"),
        (["--page", "70000"], "'--page': Input should be less than or equal to 65535"),
    ],
)
def test_what_cannot_be_played_is_one_line(
    tmp_path: Path,
    world: str,
    options: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["play", "--model", world, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sora: error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_actions_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--actions", "right"], ["--policy", "random"]):
        assert main(["play", "--model", "sprites", *options]) == 2
        error = capsys.readouterr().err
        assert "--model: sprites takes no actions: it makes whole videos" in error
        assert '"actions" in their generation_config.json' in error


def test_a_recording_of_another_world_is_refused(
    tmp_path: Path, world: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(save_world(tmp_path / "other", seed=5))
    made = tmp_path / "made.mp4"
    assert main(["play", "--model", other, "--actions", "up", "-o", str(made)]) == 0
    again = str(tmp_path / "again.mp4")
    assert main(["play", "--model", world, "--replay", str(made), "-o", again]) == 2
    assert "--replay: " in (error := capsys.readouterr().err)
    assert "recorded from another model" in error
    assert main(["play", "--model", other, "--replay", str(made), "-o", str(made)]) == 2
    assert "would be written over; name another file" in capsys.readouterr().err


# Screen.


@pytest.mark.parametrize(
    ("columns", "rows", "shown", "lines"),
    [
        (80, 24, (44, 44), 2),  # what most windows are: smaller than the picture
        (64, 34, (64, 64), 2),
        (200, 70, (128, 128), 2),
        (30, 50, (30, 30), 2),
        (40, 11, (20, 20), 1),
        (8, 4, (6, 6), 1),
        (1, 1, (6, 6), 1),  # nothing fits; nothing fails
    ],
)
def test_a_picture_fits_its_window(
    columns: int, rows: int, shown: tuple[int, int], lines: int
) -> None:
    layout = Layout.of(columns, rows, 64, 64)
    assert (layout.height, layout.width) == shown
    assert layout.lines == lines
    assert layout.left + layout.width <= layout.columns
    assert layout.top + layout.height // 2 <= layout.rows - lines


@pytest.mark.parametrize(("columns", "rows"), [(40, 20), (100, 40), (24, 12), (70, 11)])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (9, 7)])
def test_what_is_drawn_is_the_frame(columns: int, rows: int, height: int, width: int) -> None:
    """Read back from the escape codes, after frames that differ a little, and much."""
    random = np.random.default_rng(1)
    layout = Layout.of(columns, rows, height, width)
    screen, glass = Screen(layout), Glass(columns, rows)
    glass.write(screen.cleared())
    frame = random.integers(0, 4, (height, width, 3), dtype=np.uint8)
    for change in (0.0, 0.02, 0.3, 0.0, 1.0):
        frame = frame.copy()
        where = random.random((height, width)) < change
        frame[where] = random.integers(0, 256, (int(where.sum()), 3))
        sent = screen.drawn(frame)
        assert (sent == "") == (change == 0.0 and bool(glass.pictures))
        glass.write("\x1b[?2026h" + sent + screen.texts(["fps", "keys"]) + "\x1b[?2026l")
        pixels = pixels_of(glass.pictures[-1], layout.top, layout.left, layout.height, layout.width)
        if layout.height % height == 0 and layout.width % width == 0:
            expected = frame.repeat(layout.height // height, 0)
            assert np.array_equal(pixels, expected.repeat(layout.width // width, 1))
        else:  # a mean of the colours that fall together
            assert np.abs(pixels.mean((0, 1)) - frame.mean((0, 1))).max() < 12
    assert lines_of(glass.pictures[-1])[-layout.lines] == "fps"


def test_little_is_sent_where_little_changes() -> None:
    layout = Layout.of(64, 34, 64, 64)
    screen = Screen(layout)
    frame = np.full((64, 64, 3), 90, dtype=np.uint8)
    whole = screen.drawn(frame)
    assert len(whole) < 64 * 34 + 34 * 24  # a plain row is one colour and blanks
    frame = frame.copy()
    frame[10, 10] = 200
    assert screen.drawn(frame) == "\x1b[6;11H\x1b[38;2;200;200;200;48;2;90;90;90m▀"
    assert screen.texts(["one", "two"]).count("\x1b[K") == 2
    assert screen.texts(["one", "two"]) == ""
    assert cut("arrows, space act, q quit", 17) == "arrows, space act"
    assert cut("arrows, space act, q quit", 16) == "arrows"
    assert screen.texts(["x" * 99, "two"]) == "\x1b[33;1H\x1b[0m" + "x" * 63 + "\x1b[K"


# Keys.


def test_keys_are_read_from_bytes_in_any_pieces() -> None:
    sent = b"\x1b[A\x1bOB z\x1b[1;1:3CQ\t\x1b[97;1:1u\x1b[99;5u\x1b[?11u\x1b[O\x1b[1;1:2D\x03"
    expected = [
        Key("up"),
        Key("down"),
        Key("space"),
        Key("z"),
        Key("right", Act.RELEASE),
        Key("q"),
        Key("tab"),
        Key("a"),
        Key("c", ctrl=True),
        Key(SPEAKS),
        Key("away"),
        Key("left", Act.REPEAT),
        Key("c", ctrl=True),
    ]
    assert Keyboard().read(sent) == expected
    pieces = Keyboard()
    assert [key for i in range(len(sent)) for key in pieces.read(sent[i : i + 1])] == expected
    # An Escape by itself waits for what may follow, and then for nothing.
    board = Keyboard()
    assert board.read(b"\x1b") == []
    board.wait_no_longer()
    assert board.read(b"[A") == [Key("["), Key("a")]
    # What no key sends is passed over.
    assert Keyboard().read(b"\x1b[200~\xff\xc3\xa9\x1b[" + b"1;" * 40 + b"x\x1b[A")[-1] == Key("up")


def test_buttons_have_keys() -> None:
    assert bindings(["up", "down", "left", "right", "act"]) == {
        "up": "up",
        "down": "down",
        "left": "left",
        "right": "right",
        "space": "act",
    }
    many = bindings(["w", "s", "z", "forward", "jump", "1"])
    assert many == {"w": "w", "s": "s", "space": "jump", "1": "z", "2": "forward", "3": "1"}
    assert help_line(many).startswith(
        "w, s, space jump, 1 z, 2 forward, 3 1, q quit, z rewind, r rec"
    )


class Clock:
    """Time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_frames_are_seen_when_they_are_due() -> None:
    clock = Clock()
    feed = Feed(clock)
    assert feed.seen() is None
    assert feed.wait_s(0) is None
    frames = [np.full((2, 2, 3), i, dtype=np.uint8) for i in range(6)]
    feed.put(frames[:4], 10.0)
    assert feed.seen().number == 1
    assert feed.wait_s(1) == pytest.approx(0.1)
    clock.now += 0.25  # late: the one between is left out
    assert (feed.seen().number, feed.seen().frame[0, 0, 0]) == (3, 2)
    feed.cut(frames[5])  # the fourth is never seen
    assert (feed.seen().number, feed.seen().frame[0, 0, 0]) == (5, 5)
    assert feed.wait_s(5) is None
    assert feed.next(5, 0.01) is None
    assert feed.next(4, 0.01).number == 5
    feed.end()
    assert feed.next(5, 60.0) is None  # at once


def test_the_rate_is_that_of_frames() -> None:
    clock = Clock()
    feed = Feed(clock)
    for _ in range(10):
        feed.put([np.zeros((2, 2, 3), dtype=np.uint8)] * 4, 16.0)
        clock.now += 0.5  # half as fast as it is to be
    assert feed.rate() == pytest.approx(8.0, rel=0.15)


@pytest.fixture(scope="module")
def engine(world: str):
    with sora.Engine.from_pretrained(world) as engine:
        yield engine


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_player_marks_branches_goes_back_and_records(engine, tmp_path: Path) -> None:
    """Each command, by what it does to the worlds; and the recording is of what was done."""
    request = sora.SessionRequest(seed=4, fps=400.0)
    with engine.open_session(request) as first:
        player = Player(first, tmp_path / "play.mp4")
        hands = Hands(player)
        player.start()
        try:
            hands.press(Key("m"))
            until(lambda: "is marked" in player.status.message)
            marked = int(player.status.message.split()[1])
            hands.press(Key("r"))
            until(lambda: player.status.values["recording"])
            hands.press(Key("right"))
            until(lambda: any(action == Action("right") for action, _ in first.log))
            hands.press(Key("p"))
            until(lambda: player.status.values["paused"])
            steps = first.num_steps
            hands.press(Key("b"))
            until(lambda: player.status.values["worlds"] == 2)
            # The branch begins at the mark, and the recording of the other has ended.
            assert player.world is not first
            assert player.world.num_steps == marked
            assert player.recorded == [tmp_path / "play.mp4"]
            assert np.array_equal(player.seen().frame, player.world.frames[-1])
            player._asked_at.clear()  # sooner than a hand
            hands.press(Key("p"))
            until(lambda: player.world.num_steps > marked + 2)
            assert first.num_steps == steps
            assert not hands.press(Key("q"))
            branch = player.world
            hands.press(Key("tab"))
            until(lambda: player.world is first)
            until(lambda: first.num_steps > steps)
        finally:
            player.stop()
        assert player.over
        assert player.error is None
        assert branch.closed
        assert not first.closed
    with engine.open_session(request) as again:
        frames = [again.step(action) for action, times in first.log for _ in range(times)]
    recorded = list(engine.replay(tmp_path / "play.mp4"))
    begin = steps - len(recorded)
    assert marked <= begin < steps
    assert np.array_equal(np.stack(frames[begin:steps]), np.stack(recorded))


def test_a_player_goes_back_two_seconds_and_says_what_it_cannot(engine, tmp_path: Path) -> None:
    with engine.open_session(sora.SessionRequest(seed=4, fps=8.0, rewind=5)) as session:
        for action in session.actions.parse("right*6"):
            session.step(action)
        player = Player(session, tmp_path / "play.mp4")
        player._paused = True  # so that it does what is said, and nothing else
        player.start()
        try:
            player.do("rewind")  # two seconds are four steps of the five that are kept
            until(lambda: player.status.message)
            assert player.status.message == "2.0 s back, at step 2"
            assert np.array_equal(player.seen().frame, session.frames[-1])
            player._asked_at.clear()
            player.do("rewind")
            until(lambda: player.status.message == "0.5 s back, at step 1")
            player._asked_at.clear()
            player.do("rewind")
            until(lambda: player.status.message == "nothing further back is kept")
            player.do("rewind")  # too soon: a key that is held
            assert "rewind" not in player._pending
        finally:
            player.stop()


def test_a_player_ends_with_the_error_of_its_world(engine, tmp_path: Path) -> None:
    with engine.open_session(sora.SessionRequest(seed=4)) as session:
        player = Player(session, tmp_path / "play.mp4")
        player.start()
        session.close()
        until(lambda: player.over)
        player.stop()
    assert isinstance(player.error, sora.SoraError)


def test_a_held_key_goes_on_where_the_terminal_tells_of_its_release(engine, tmp_path) -> None:
    with engine.open_session(sora.SessionRequest(seed=4)) as session:
        player = Player(session, tmp_path / "play.mp4")
        hands = Hands(player)
        asked = player.keys
        hands.press(Key("right"))  # no word of releases: a key is a tap
        assert [asked(), asked()] == [Action("right"), Action()]
        hands.press(Key(SPEAKS))
        hands.press(Key("right"))
        hands.press(Key("right", Act.REPEAT))
        hands.press(Key("space"))
        hands.press(Key("space", Act.RELEASE))
        both = Action(frozenset({"right", "act"}))
        assert [asked(), asked(), asked()] == [both, Action("right"), Action("right")]
        hands.press(Key("away"))
        assert asked() == Action()


def test_a_recording_writes_over_nothing(tmp_path: Path) -> None:
    path = tmp_path / "play.mp4"
    assert unused(path) == path
    path.touch()
    (tmp_path / "play-2.mp4").touch()
    assert unused(path) == tmp_path / "play-3.mp4"
