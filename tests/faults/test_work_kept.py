"""What happens to files while a job runs loses none of its work."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine.cli import main
from sora_engine.io.latents import SUFFIX, SavedLatents
from sora_engine.io.provenance import read_provenance
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import VideoWriter, write_video
from sora_engine.request.recipe import provenance_of
from sora_engine.runtime.job import Job
from tests.faults.engines import engine, save_midway

SMALL = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 3, "seed": 1}
QUICK = ["--size", "16x16", "--frames", "5", "--steps", "2", "--seed", "1"]
CLIP = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)


def request(**more):
    return sora.VideoRequest("a red circle", **{**SMALL, **more})


@pytest.mark.parametrize(
    ("what", "fate"),
    [
        ("clip", "removed"),
        ("start video", "replaced"),
        ("part of a clip", "replaced"),
        ("folder", "removed"),
    ],
)
def test_a_clip_that_changes_once_it_is_read(tmp_path, what, fate):
    """It fails no job, and what the result says of it is what was read."""
    path = tmp_path / ("clip" if what == "folder" else "clip.mp4")
    write_video(path, CLIP, 8)

    def change(_):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if fate == "replaced":
            write_video(path, CLIP[::-1], 8)

    clip = sora.Footage(path, 0, 5) if what == "part of a clip" else path
    asked = request(init=clip) if what == "start video" else request(clips=[sora.Clip(clip)])
    with engine() as made:
        want = made.generate(asked)
        expected = provenance_of(made.resolve(asked), made.model)
        for options in ({}, {"save_to": tmp_path / "job.safetensors"}):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            write_video(path, CLIP, 8)
            video = made.submit(asked, on_progress=change, **options).result(300)
            assert torch.equal(video.latents, want.latents)
            assert video.provenance == expected


@pytest.mark.parametrize("save_to", ["", "/", "..", "a\0b", "."])
def test_a_state_under_no_name_is_refused_at_once(save_to):
    with engine() as made:
        with pytest.raises(sora.RequestError, match=r"save_to: .*name"):
            made.submit(request(), save_to=save_to)
        job = made.submit(request())
        with pytest.raises(OSError, match="name"):
            job.save(save_to)
        assert job.result(300).frames.any()


def test_a_folder_is_no_state(tmp_path):
    with engine() as made:
        with pytest.raises(sora.RequestError, match=r"save_to: .* is a folder; name a file"):
            made.submit(request(), save_to=tmp_path)
        job = made.submit(request(num_inference_steps=9))
        with pytest.raises(IsADirectoryError, match="name a file"):
            job.save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_two_jobs_do_not_keep_their_states_in_one_file(tmp_path):
    kept, link = tmp_path / "job", tmp_path / "link"
    link.symlink_to("job")
    with engine() as made:
        job = made.submit(request(num_inference_steps=900), save_to=kept)
        for path in (kept, link, tmp_path / "." / "job", tmp_path / "gone" / ".." / "job"):
            with pytest.raises(sora.RequestError, match=r"save_to: another job that is not done"):
                made.submit(request(), save_to=path)
        job.cancel()
        with pytest.raises(sora.JobCancelledError):
            job.result(300)
        assert made.submit(request(), save_to=kept).result(300).frames.any()
        assert made.submit(request(), save_to=kept).result(300).frames.any()
        # The one that goes on keeps its state where it was.
        assert made.resume(kept, save_to=kept).result(300).frames.any()


@pytest.mark.parametrize("error", [TypeError("no JSON"), MemoryError(), ValueError("x")], ids=repr)
def test_whatever_keeps_a_state_from_being_written_fails_no_job(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("sora_engine.runtime.saving.save_state", fail)
    with engine() as made:
        job = made.submit(request(), save_to=tmp_path / "job")
        assert job.result(300).frames.any()
        assert job.save_error is error


def test_a_device_that_fails_while_a_state_is_saved_has_failed(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("sora_engine.runtime.saving.save_state", fail)
    with engine() as made:
        job = made.submit(request(), save_to=tmp_path / "job")
        with pytest.raises(sora.DeviceError, match="illegal memory access"):
            job.result(300)


def overwrite(path: Path) -> None:
    """Other bytes in the place of a file's last half, and none behind: as `cp` over it does."""
    half = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(half)
        file.write(b"\x77" * half)


def test_a_file_that_changes_after_it_was_read_changes_nothing(tmp_path):
    """What is mapped would change with it; and where it gets shorter the process would end."""
    path = tmp_path / "latents"
    latents = torch.randn(8, 4, 32, 32)
    read = SavedLatents.read(SavedLatents(latents, 8.0, False, "sprites").write(path))
    overwrite(path)
    assert torch.equal(read.latents, latents)
    path.write_bytes(b"")
    assert torch.equal(read.latents, latents)

    kept = tmp_path / "job"
    with engine() as made:
        whole = made.generate(request())
        save_midway(made, request(), kept, 2)
        with made._workers[0]._wake:
            job = made.resume(kept)
            overwrite(kept)
            kept.write_bytes(b"")
        video = job.result(300)
        assert video.receipt.resumed_at == 2
        assert torch.equal(video.latents, whole.latents)
        assert np.array_equal(video.frames, whole.frames)


def test_a_file_of_another_kind_is_told_by_its_header_alone(tmp_path):
    """One of weights may be larger than memory: here 1 TB of nothing follows the header."""
    path = tmp_path / "weights"
    tensor = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"w": tensor}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + (1 << 40))
        except OSError:
            pytest.skip("this file system has no files of 1 TB")
    with pytest.raises(sora.MediaError, match=r"holds \['w'\]: these are no finished latents"):
        SavedLatents.read(path)
    with engine() as made, pytest.raises(sora.CheckpointError, match="nothing about a job"):
        made.resume(path)


def test_pipes_are_refused_and_nobody_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(sora.MediaError, match="it is a device, a pipe or a socket"):
        SavedLatents.read(tmp_path / "pipe")
    with engine() as made, pytest.raises(sora.CheckpointError, match="it is a device, a pipe"):
        made.resume(tmp_path / "pipe")
    with pytest.raises(sora.CheckpointError, match="a device, a pipe or a socket"):
        sora.Engine.from_pretrained(tmp_path / "pipe")


@pytest.mark.parametrize("left_out", ["model", "dtype", "request", "provenance", "frame_texts"])
def test_a_saved_job_that_lacks_something_is_refused(tmp_path, left_out):
    path = tmp_path / "job"
    with engine() as made:
        made.submit(request(), save_to=path).result(300)
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["sora_engine"])
        del said[left_out]
        save_file(load_file(path), path, {"sora_engine": json.dumps(said)})
        with pytest.raises(sora.CheckpointError, match=r"saved|damaged"):
            made.resume(path)


def test_what_callbacks_get_they_may_write_into():
    with engine() as made:
        want = made.generate(request())
        asked = {"on_latents": torch.Tensor.zero_, "on_frames": lambda frames: frames.fill(0)}
        video = made.submit(request(), **asked).result(300)
        assert torch.equal(video.latents, want.latents)
        assert np.array_equal(video.frames, want.frames)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_and_its_jobs_say_that_they_are_of_one_process(way):
    with engine() as made:
        job = made.submit(request())
        with pytest.raises(TypeError, match=r"an Engine .* cannot be copied or pickled; make one"):
            way(made)
        with pytest.raises(TypeError, match=r"a Job .* cannot be copied or pickled; the Video"):
            way(job)
        video = job.result(300)
        assert np.array_equal(pickle.loads(pickle.dumps(video)).frames, video.frames)


# The command.


def offered(out: str) -> list[str]:
    """The arguments of the `sora decode` that the command advises."""
    (line,) = [line for line in out.splitlines() if line.startswith("the finished latents are in")]
    return line.split("`")[1].split()[1:]


def test_a_clip_that_goes_while_the_command_works(tmp_path, monkeypatch):
    write_video(tmp_path / "in.mp4", CLIP, 8)
    count_step = Job.count_step

    def gone(job):
        (tmp_path / "in.mp4").unlink(missing_ok=True)
        count_step(job)

    monkeypatch.setattr(Job, "count_step", gone)
    output = tmp_path / "a.mp4"
    arguments = ["extend", str(tmp_path / "in.mp4"), "--after", "1", *QUICK[-4:], "-o", str(output)]
    assert main(arguments) == 0
    assert read_provenance(output).settings["clips"][0]["frames"]["name"] == "in.mp4"
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("when", ["denoising", "decoding"])
def test_an_output_folder_that_goes_leaves_the_latents_elsewhere(
    tmp_path, monkeypatch, capsys, when
):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    name = {"denoising": "count_step", "decoding": "count_frames"}[when]
    counted = getattr(Job, name)

    def gone(job, *count):
        shutil.rmtree(folder, ignore_errors=True)
        counted(job, *count)

    monkeypatch.setattr(Job, name, gone)
    output = folder / "a.mp4"
    assert main(["generate", "a red circle", *QUICK, "-o", str(output)]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith(f"sora: error: {output} cannot be written: ")
    folder.mkdir()
    monkeypatch.undo()
    latents = elsewhere / f"a.mp4{SUFFIX}"
    assert offered(said.out) == ["decode", str(latents), "-o", str(output)]
    assert main(offered(said.out)) == 0
    assert read_video(output)[0].shape == (5, 16, 16, 3)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_is_not_finished_is_offered_for_decoding(tmp_path, monkeypatch, capsys, error):
    """All frames are there; what fails, or is stopped, is the end of the file."""

    def fail(*_):
        raise error

    monkeypatch.setattr("sora_engine.io.video_writer._Mp4Writer.close", fail)
    output = tmp_path / "a.mp4"
    code = main(["generate", "a red circle", *QUICK, "-o", str(output)])
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [f"a.mp4{SUFFIX}"]
    assert main(offered(capsys.readouterr().out)) == 0
    assert read_video(output)[0].shape == (5, 16, 16, 3)


def test_a_second_interrupt_still_tells_where_the_latents_are(tmp_path, monkeypatch, capsys):
    result, interrupts = Job.result, [KeyboardInterrupt(), KeyboardInterrupt()]

    def interrupted(job, timeout_s=None):
        while job.latents is None and not job.done():  # a quick job may be done by the first look
            time.sleep(0.001)
        if interrupts:
            raise interrupts.pop()
        return result(job, timeout_s)

    monkeypatch.setattr(Job, "result", interrupted)
    output = tmp_path / "a.mp4"
    assert main(["generate", "a red circle", *QUICK, "-o", str(output)]) == 130
    assert interrupts == []
    said = capsys.readouterr()
    assert said.err == "sora: error: interrupted\n"
    path = Path(offered(said.out)[1])
    assert SavedLatents.read(path).latents.shape[1] == 2


def test_two_commands_of_one_output_keep_latents_of_their_own(tmp_path, monkeypatch):
    """Another command ends while this one decodes: it takes nothing of this one's away."""
    from sora_engine.cli import safety_copy

    counted, seen = Job.count_frames, []
    output = tmp_path / "a.mp4"

    def meanwhile(job, *count):
        if not seen:
            other = safety_copy.SafetyCopy(
                str(output), lambda latents: SavedLatents(latents, 8.0, False, "sprites")
            )
            other.keep(torch.zeros(1, 1, 2, 2))
            seen.append(sorted(path.name for path in tmp_path.glob(f"*{SUFFIX}")))
            other.remove()
            seen.append(sorted(path.name for path in tmp_path.glob(f"*{SUFFIX}")))
        counted(job, *count)

    monkeypatch.setattr(Job, "count_frames", meanwhile)
    assert main(["generate", "a red circle", *QUICK, "-o", str(output)]) == 0
    assert seen == [[f"a.mp4-2{SUFFIX}", f"a.mp4{SUFFIX}"], [f"a.mp4{SUFFIX}"]]
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ""])
def test_a_target_that_becomes_another_thing_is_left_as_it_is(tmp_path, suffix):
    writer = VideoWriter(tmp_path / f"a{suffix}", 8)
    for frame in CLIP:
        writer.write(frame)
    (tmp_path / f"a{suffix}").mkdir()
    (tmp_path / f"a{suffix}" / "thesis.txt").write_text("do not delete")
    with pytest.raises(sora.MediaError, match=r"cannot be written|thesis"):
        writer.close()
    assert os.listdir(tmp_path) == [f"a{suffix}"]
    assert (tmp_path / f"a{suffix}" / "thesis.txt").read_text() == "do not delete"
