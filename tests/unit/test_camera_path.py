"""Where the camera is: moves, pose files, rows of numbers, and what is none of them."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_engine import VideoRequest, tasks
from sora_engine.cli import main
from sora_engine.config import Limits
from sora_engine.errors import RequestError
from sora_engine.request import resolve_request
from sora_engine.request.camera import COLUMNS, MOVES, CameraPath, resolve_camera
from sora_engine.request.cascade import staged
from sora_engine.request.unread import unread
from tests.unit.test_request import FACTS

STILL = [0, 0.5, 0.9, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def matrices(camera, frames=81):
    """World to camera, `[frames, 4, 4]`."""
    poses = np.array(resolve_camera(camera, frames).poses)
    bottom = np.broadcast_to([0.0, 0, 0, 1], (frames, 1, 4))
    return np.concatenate([poses[:, 4:].reshape(-1, 3, 4), bottom], axis=1)


@pytest.mark.parametrize(
    ("moves", "last"),
    [
        # Of VideoX-Fun's files of 81 poses the numbers that are not those of a still camera.
        ("pan left", {3: 1.4814814814814814}),
        ("pan right", {3: -1.4814814814814814}),
        ("pan up", {7: 1.4814814814814814}),
        ("Pan Left + pan up", {3: 1.4814814814814814, 7: 1.4814814814814814}),
        ("zoom in", {11: -2.962962962962963}),
        ("zoom out", {11: 2.962962962962963}),
        ("acw", {0: 0.5111541954058733, 1: -0.8594890275733451,
                 4: 0.8594890275733451, 5: 0.5111541954058733}),
        ("cw", {0: 0.5111541954058733, 1: 0.8594890275733451,
                4: -0.8594890275733451, 5: 0.5111541954058733}),
        ("static", {}),
    ],
)  # fmt: skip
def test_moves_are_those_of_the_published_files(moves, last):
    path = resolve_camera(moves, 81)
    want = np.eye(4)[:3].flatten()
    want[list(last)] = list(last.values())
    assert np.abs(np.array(path.poses[-1][4:]) - want).max() < 1e-12
    assert {pose[:4] for pose in path.poses} == {(0.532139961, 0.946026558, 0.5, 0.5)}
    assert len(path.poses) == 81
    assert path.told == moves.lower()


def test_moves_follow_each_other():
    """Each has its share of the steps, goes on where the last has ended, and in its axes."""
    found = matrices("pan left x2, acw, zoom in x0.5", 10)
    step, turn = 1 / 54, math.pi / 243
    left, ahead, roll = np.eye(4), np.eye(4), np.eye(4)
    left[0, 3], ahead[2, 3] = 2 * step, -step
    roll[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    at = np.eye(4)
    for i, move in enumerate([np.eye(4), *[left] * 3, *[roll] * 3, *[ahead] * 3]):
        at = move @ at
        assert np.abs(found[i] - at).max() < 1e-12, i
    assert np.array_equal(found, matrices(["pan left x2", "acw", "zoom in x0.5"], 10))
    assert np.array_equal(found, matrices(["pan left x2, acw", "zoom in x0.5"], 10))
    assert np.array_equal(matrices("zoom in x0", 5), matrices("static", 5))
    # The camera itself: a pan to the left takes it there, a zoom along its view.
    for moves, way in {"pan left": [-1, 0, 0], "pan up": [0, -1, 0], "zoom in": [0, 0, 1]}.items():
        centre = np.linalg.inv(matrices(moves, 2)[1])[:3, 3]
        assert np.abs(centre / np.linalg.norm(centre) - way).max() < 1e-12
    assert len(resolve_camera("pan left", 1).poses) == 1


def written(tmp_path, rows, head="https://example.org", name="poses.txt"):
    lines = [head, *(" ".join(map(str, row)) for row in rows)]
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file_is_read(tmp_path):
    rows = [[i, *STILL[1:10], 0.5 * i, *STILL[11:]] for i in range(7)]
    path = written(tmp_path, rows)
    found = resolve_camera(path, 5)
    assert [pose[7] for pose in found.poses] == [0, 0.5, 1.0, 1.5, 2.0]
    assert (found.told, found.left_over, len(found.sha256)) == ("poses.txt", 2, 64)
    assert str(found) == "poses.txt"
    # Without a first line, or with an empty one; with tabs; as numbers; as an array.
    for other in (
        written(tmp_path, rows[1:], " ".join(map(str, rows[0]))),
        written(tmp_path, rows, ""),
        written(tmp_path, rows, "a link\t", "other.txt"),
        rows,
        np.array(rows),
        tuple(map(tuple, rows)),
    ):
        assert resolve_camera(other, 5).poses == found.poses
    assert CameraPath.from_json(found.to_json()) == found
    assert CameraPath.from_json(None) is None
    for poses in ([], [[1.0] * 15], [[math.nan] * 16], ["x" * 16]):
        with pytest.raises((ValueError, TypeError)):
            CameraPath.from_json({"poses": poses, "told": "", "sha256": ""})
    # A file may be called as a move is.
    assert resolve_camera(str(written(tmp_path, rows, name="zoom in")), 5).poses == found.poses


def test_stages_of_a_cascade_are_told_of_no_camera():
    base = VideoRequest("a", num_frames=5, camera="acw")
    assert tasks.cascade(base, [tasks.Stage(scale=2)]).base.camera == "acw"
    after = staged(tasks.Stage(frames=2), base, None, (32, 32, 5), 8.0, FACTS)
    assert (after.num_frames, after.camera) == (9, None)


def test_what_is_left_over_is_told():
    rows = [STILL] * 7
    request = VideoRequest("a", num_frames=5, guidance_scale=1.0, camera=rows)
    resolved = resolve_request(request, FACTS, Limits())
    told = ["the last 2 of the camera's poses are not read: the video has 5 frames"]
    assert unread(request, resolved, 1) == told
    assert resolved.memory_key() == replace(resolved, camera=resolve_camera("acw", 5)).memory_key()
    assert resolved.memory_key() != replace(resolved, camera=None).memory_key()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [STILL] * 4,
            r"camera file .*poses\.txt has 4 poses, and the video 5 frames; num_frames=4",
        ),
        ([STILL, STILL[:-1]], r"camera file .*, line 3 has 18 numbers; a pose has 19: a time, fx"),
        ([STILL, [*STILL, 1]], "line 3 has 20 numbers"),
        ([STILL, [*STILL[:-1], "x"]], "line 3: could not convert string to float: 'x'"),
        ([STILL, [*STILL[:-1], "nan"]], "line 3 must be finite, got nan"),
        ([[0, 0.0, *STILL[2:]]], r"line 2: fx 0 and fy 0\.9 must be over 0"),
        ([[*STILL[:7], *[0.0] * 12]], "line 2: its 3 x 3 numbers are no rotation: their det"),
        ([], r"has 0 poses, and the video 5 frames; a pose for each would work"),
    ],
)
def test_files_that_are_none(tmp_path, rows, message):
    with pytest.raises(RequestError, match=message):
        resolve_camera(written(tmp_path, rows), 5)


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        ("nowhere.txt", r"camera 'nowhere\.txt' is no move \(static, .*\) and cannot be read as a"),
        ("", "camera '.' is no move"),
        ("pan", r"camera move 'pan' is none of static, pan left"),
        ("zoom in, fly", "camera move 'fly' is none of"),
        ("pan left, ", "camera move '' is none of"),
        ("zoom in x-1", "camera move 'zoom in x-1' is none of"),
        ("zoom in x" + "9" * 400, "is over x1000, the most"),
        ("acw, cw, acw, cw, acw", "camera has 5 moves, .* and the video 5 frames; at most 4"),
        (["poses.txt"], r"camera move 'poses\.txt' is none of"),
        ([], "camera must be the path of a pose file, moves such as"),
        (3.5, r"camera must be .* got 3\.5"),
        ([STILL[:-1]] * 5, "camera's pose 0 has 18 numbers"),
        ([STILL, "pan left"], "camera's pose 1 has 'pan left'"),
        ([[*STILL[:-1], True]] * 5, "camera's pose 0 must be a number, got True"),
        ([STILL] * 4, "camera has 4 poses, and the video 5 frames"),
        ("x" * 100_000, "cannot be read as a pose file"),
        ("zoom in \0", "camera move .* is none of"),
    ],
)
def test_cameras_that_are_none(camera, message):
    with pytest.raises(RequestError, match=message):
        resolve_camera(camera, 5)


def test_a_file_of_bytes_or_of_any_size_is_refused(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(RequestError, match="cannot be read as a pose file: 'utf-8' codec"):
        resolve_camera(path, 5)
    with path.open("wb") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(RequestError, match="has over 33554432 bytes: no poses"):
        resolve_camera(path, 5)


@pytest.mark.parametrize("camera", ["pan lft", "poses.txt", "pipe"])
def test_the_command_line_tells_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, camera):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("first.png")
    os.mkfifo("pipe")
    Path("poses.txt").write_text("\n1 2 3\n")
    says = {
        "pan lft": "--camera: camera move 'pan lft' is none of static, pan left",
        "poses.txt": "--camera: camera file poses.txt, line 2 has 3 numbers; a pose has 19",
        "pipe": "--camera: camera 'pipe' is no move (static, pan left, pan right, pan up, pan down",
    }
    for command in (["generate", "a cat", "--image", "first.png"], ["animate", "first.png"]):
        assert main([*command, "--camera", camera, "--model", "sprites", "-o", "a.mp4"]) == 2
        assert says[camera] in capsys.readouterr().err


def test_every_move_is_in_the_docs():
    page = Path(__file__).parents[2].joinpath("docs/tasks.md").read_text(encoding="utf-8")
    assert all(f"`{move}`" in page for move in MOVES)
    assert f"{COLUMNS} numbers" in page
