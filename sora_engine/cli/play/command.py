"""`sora play`: a world in the terminal, on a page, or as a script has it."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_engine.cli.app import OnceCommand, UsageError, app, say
from sora_engine.cli.options import Common, Device, Dtype, in_options, parse_size
from sora_engine.cli.play import script
from sora_engine.cli.work import load_engine
from sora_engine.errors import ActionError, MediaError, RequestError, SessionError, SoraError
from sora_engine.request import Action, SessionRequest
from sora_engine.version import version

if TYPE_CHECKING:
    from sora_engine.cli.play.terminal import Terminal
    from sora_engine.runtime.engine import Engine
    from sora_engine.runtime.session import Session

WORLD = "meadow"
"""The bundled checkpoint that is played."""
REWIND = 40
"""Steps that can be gone back by: ten seconds of the bundled world."""
ANY_PORT = "0"


class PlayCommand(OnceCommand):
    """`--page` takes a port, or nothing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        if "--page" in given:
            at = given.index("--page") + 1
            if at == len(given) or not given[at].isdigit():
                given.insert(at, ANY_PORT)
        return super().parse_args(ctx, given)


@app.command(cls=PlayCommand)
def play(
    model: Annotated[
        str, typer.Option(help="A checkpoint that takes actions: as of `sora generate`.")
    ] = WORLD,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the world is.")] = None,
    first: Annotated[
        str | None, typer.Option(metavar="PICTURE", help="The picture that it begins with.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all noise; drawn at random by default.")] = (
        None
    ),
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.")] = None,
    denoising: Annotated[
        int | None, typer.Option(help="Denoising steps of each latent frame.")
    ] = None,
    actions: Annotated[
        str | None, typer.Option(help='What is done, such as "right*8 act still*2 left+act".')
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Who plays: random, or still, which does nothing.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Actions of --policy.")] = 100,
    replay: Annotated[
        str | None, typer.Option(metavar="FILE", help="Play a recording again.")
    ] = None,
    page: Annotated[
        int | None,
        typer.Option(
            metavar="[PORT]", min=0, max=65535, help="On a page at 127.0.0.1, not in the terminal."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Recording, an .mp4: of a script from its beginning, else once r is pressed "
            "(play.mp4).",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Bits that hang on nothing that runs beside it.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Play a world that is made while it is played.

    In a terminal: arrows move, space acts, z goes back two seconds, m marks, b branches off from
    the mark, Tab goes to the other world, r records, p pauses, q quits.
    """
    modes = {"--actions": actions, "--policy": policy, "--replay": replay, "--page": page}
    given = [name for name, value in modes.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} are two ways to play; one would work")
    chosen = None if policy is None else script.policy_named(policy)
    to = None if output is None else _recording(output, replay)
    terminal = None
    if not given or (replay is not None and to is None):
        from sora_engine.cli.play.terminal import Terminal

        terminal = Terminal()
    height, width = (None, None) if size is None else parse_size(size)
    request = SessionRequest(
        prompt or "",
        first=first,
        height=height,
        width=width,
        fps=fps,
        num_inference_steps=denoising,
        seed=seed,
        exact=exact,
        rewind=0 if actions is not None or policy is not None else REWIND,
    )
    say(f"sora_engine {version()}: loading {model}")
    with closing(load_engine(Common(model=[model], device=device, dtype=dtype))) as engine:
        if replay is not None:
            return _replay(engine, replay, to, terminal)
        todo: list[Action] = []
        if actions is not None:
            todo = _parsed(engine, model, actions)
        with _opened(engine, model, request) as world:
            height, width = world.frames.shape[1:3]
            say(f"{width}x{height} at {world.fps:g} fps, seed {world.seed}")
            if chosen is not None:
                todo = list(islice(chosen(world.actions, world.seed), steps))
            if todo:
                frames = _at_work(lambda: script.run(world, todo, len(todo), to))
                into = "" if to is None else f"{to}: "
                say(f"{into}{len(todo)} steps, {frames} frames, {script.summary(world)}")
                return
            _play(world, to or Path("play.mp4"), terminal, page)


def _recording(output: str, replay: str | None) -> Path:
    """Where a recording goes; UsageError where none can."""
    from sora_engine.io.video_writer import check_output
    from sora_engine.runtime.recording import SUFFIX

    path = Path(output)
    if path.suffix.lower() != SUFFIX:
        raise UsageError(f"--output: {output} must end in {SUFFIX}, as what is played is one")
    if replay is not None and path.exists() and os.path.samefile(path, replay):
        raise UsageError(f"--output: {replay} would be written over; name another file")
    try:
        check_output(output)
    except SoraError as error:
        raise UsageError(f"--output: {error}") from error
    return path


def _parsed(engine: Engine, model: str, actions: str) -> list[Action]:
    driving = engine.loaded_model.driving
    if driving is None:
        _opened(engine, model, SessionRequest())  # says why not
        raise AssertionError
    try:
        todo = driving.actions.parse(actions)
    except ActionError as error:
        raise UsageError(f"--actions: {error}") from error
    if not todo:
        raise UsageError("--actions: nothing is to be done; right*8 would work")
    return todo


def _opened(engine: Engine, model: str, request: SessionRequest) -> Session:
    """The world; UsageError for a checkpoint that makes none, and for a value that cannot be."""
    from sora_engine.models.registry import BUNDLED

    try:
        return engine.open_session(request)
    except SessionError as error:
        also = f". {WORLD!r}, which is bundled, takes them" if WORLD in BUNDLED else ""
        raise UsageError(f"--model: {error}{also}") from error
    except RequestError as error:
        raise UsageError(in_options(error)) from error
    except MediaError as error:
        raise UsageError(f"--first: {error}") from error


def _at_work(work: Any) -> Any:
    """RequestErrors of what is done, and what cannot be written, as lines for the user."""
    try:
        return work()
    except RequestError as error:
        raise UsageError(in_options(error)) from error


def _play(world: Session, output: Path, terminal: Terminal | None, page: int | None) -> None:
    """Somebody plays, until it is enough."""
    from sora_engine.cli.play.player import Player

    player = Player(world, output)
    with ExitStack() as stack:
        stack.callback(lambda: _tell_of(world, player.recorded))
        if terminal is None:
            from sora_engine.cli.play.page import PageServer

            server = stack.enter_context(PageServer(player, page or 0))
            say(f"http://{server.hosts[0]} has it; Ctrl-C ends it")
            stack.callback(player.stop)
            player.start()
            with suppress(KeyboardInterrupt):
                server.serve_forever()
            if player.error is not None:
                raise player.error
            return
        from sora_engine.cli.play.hands import Hands
        from sora_engine.cli.play.show import show

        stack.enter_context(terminal)
        stack.callback(player.stop)
        player.start()
        show(terminal, player, Hands(player).press)


def _tell_of(world: Session, recorded: list[Path]) -> None:
    for path in recorded:
        say(f"{path}: recorded; sora play --replay {path} plays it again")
    say(f"{world.num_steps} steps, {script.summary(world)}")


def _replay(engine: Engine, path: str, to: Path | None, terminal: Terminal | None) -> None:
    """A recording again: into a file, or to be seen."""
    from sora_engine.io.video_reader import open_video

    try:
        steps = engine.replay(path, record=to)
        with closing(open_video(path)) as video:
            fps = float(video.streams.video[0].average_rate)
    except SoraError as error:
        raise UsageError(f"--replay: {error}") from error
    if terminal is None:
        frames = sum(len(each) for each in steps)
        say(f"{to}: {frames} frames of {path} again")
        return
    from sora_engine.cli.play.replay import Replay
    from sora_engine.cli.play.show import show

    feed = Replay(steps, fps)
    thread = threading.Thread(target=feed.run, name="sora-replay", daemon=True)
    with terminal:
        thread.start()
        try:
            show(terminal, feed, lambda key: key.name != "q")
        finally:
            feed.stopped = True
            thread.join()
