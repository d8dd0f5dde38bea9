"""What a player does: buttons and axes, a camera's way, a text. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sora_engine.errors import ActionError, RequestError
from sora_engine.request.checks import finite, integer, shown

STILL = "still"
"""How `ActionSpace.parse` calls a step at which nothing is pressed."""
MAX_REPEATS = 100_000
"""The most steps that one word of `ActionSpace.parse` stands for."""


@dataclass(frozen=True, slots=True)
class Action:
    """What is done while one latent frame is made.

    press: the buttons that are down: a set of names, or one name.
    axes: by name a value from -1 to 1; those that are left out are 0.
    move: how far down and right the camera goes, in pixels, where that is not what the buttons
        say (`ActionSpace.moves`).
    prompt: the text that this latent frame and all later ones read.

    Raises ActionError for a value of the wrong kind. Which names there are, the checkpoint says:
    `Session.step` raises ActionError for others.
    """

    press: frozenset[str] = frozenset()
    axes: Mapping[str, float] = field(default_factory=dict)
    move: tuple[float, float] | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        press: Any = self.press
        press = (press,) if isinstance(press, str) else press
        if not isinstance(press, Iterable) or not all(isinstance(b, str) for b in press):
            raise ActionError(f"press must be names of buttons, got {shown(press)}")
        if not isinstance(self.axes, Mapping):
            raise ActionError(f"axes must be values by name, got {shown(self.axes)}")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise ActionError(f"an action's prompt must be a text, got {shown(self.prompt)}")
        axes = {str(name): _number(f"axis {name!r}", at) for name, at in self.axes.items()}
        object.__setattr__(self, "press", frozenset(press))
        object.__setattr__(self, "axes", MappingProxyType(axes))
        if self.move is not None:
            object.__setattr__(self, "move", _pair("an action's move", self.move))

    def __hash__(self) -> int:
        return hash((self.press, tuple(sorted(self.axes.items())), self.move, self.prompt))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.press, dict(self.axes), self.move, self.prompt)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without what is not said."""
        values: dict[str, Any] = {}
        if self.press:
            values["press"] = sorted(self.press)
        if self.axes:
            values["axes"] = dict(sorted(self.axes.items()))
        if self.move is not None:
            values["move"] = list(self.move)
        if self.prompt is not None:
            values["prompt"] = self.prompt
        return values

    @classmethod
    def from_json(cls, values: Any) -> Action:
        """Reads `to_json` back. Raises ActionError."""
        known = {"press", "axes", "move", "prompt"}
        if not isinstance(values, Mapping) or not set(values) <= known:
            raise ActionError(f"an action has {sorted(known)}, got {shown(values)}")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class ActionSpace:
    """What can be done in a checkpoint's worlds, as its `generation_config.json` has it.

    buttons, axes: their names, in the order in which the model reads them.
    moves: by button how far down and right the camera goes while one latent frame is made, in
        pixels. Buttons that are not there move nothing; those that are pressed together add up.
    """

    buttons: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    moves: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """How many numbers an action is to the model."""
        return len(self.buttons) + len(self.axes)

    def check(self, action: object) -> Action:
        """The action, if it can be done here. ActionError names the nearest that can."""
        if not isinstance(action, Action):
            would = f'Action("{self.buttons[0]}")' if self.buttons else "Action()"
            raise ActionError(f"an action is an Action, got {shown(action)}; {would} would work")
        for name in sorted(action.press):
            self._known("button", name, self.buttons)
        for name, value in action.axes.items():
            self._known("axis", name, self.axes)
            if not -1 <= value <= 1:
                raise ActionError(f"axis {name!r} is {value:g}; it must be from -1 to 1")
        return action

    def encode(self, action: Action) -> tuple[float, ...]:
        """What the model reads of it: 1 for each button that is down and 0 for others, then the
        axes. ActionError as of `check`."""
        self.check(action)
        buttons = (float(name in action.press) for name in self.buttons)
        return (*buttons, *(action.axes.get(name, 0.0) for name in self.axes))

    def move_of(self, action: Action) -> tuple[float, float]:
        """How far down and right it takes the camera, in pixels."""
        if action.move is not None:
            return action.move
        ways = [self.moves[name] for name in sorted(action.press) if name in self.moves]
        return sum(way[0] for way in ways), sum(way[1] for way in ways)

    def parse(self, text: str) -> list[Action]:
        """The actions that a text such as `"right*8 act still*2 left+act"` says, a step each.

        Words are names of buttons, joined by `+` where several are down, and `axis=0.5`; `*n`
        repeats a word n times, and `still` presses nothing. Raises ActionError.
        """
        if not isinstance(text, str):
            raise ActionError(f"actions are a text such as 'right*8 act', got {shown(text)}")
        actions: list[Action] = []
        for word in text.split():
            names, star, times = word.partition("*")
            count = 1
            if star:
                count = int(times) if times.isascii() and times.isdigit() else 0
                if not 1 <= count <= MAX_REPEATS:
                    raise ActionError(
                        f"{word!r} is to be done {times!r} times; a number from 1 to "
                        f"{MAX_REPEATS} would work"
                    )
            actions += [self.check(self._word(names, word))] * count
        return actions

    def to_json(self) -> dict[str, Any]:
        """As `generation_config.json` has it."""
        moves = {name: list(way) for name, way in self.moves.items()}
        return {"buttons": list(self.buttons), "axes": list(self.axes), "moves": moves}

    def _word(self, names: str, word: str) -> Action:
        if names == STILL and STILL not in self.buttons:
            return Action()
        press, axes = set(), {}
        for name in names.split("+"):
            axis, equals, value = name.partition("=")
            if not equals:
                press.add(name)
                continue
            try:
                axes[axis] = float(value)
            except ValueError:
                raise ActionError(
                    f"{word!r} puts axis {axis!r} at {value!r}; a number from -1 to 1 would work"
                ) from None
        return Action(frozenset(press), axes)

    def _known(self, kind: str, name: str, names: Sequence[str]) -> None:
        if name in names:
            return
        if not names:
            raise ActionError(f"{kind} {name!r} is not known; this checkpoint has none")
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise ActionError(
            f"{kind} {name!r} is not known; the nearest is {near[0]!r}, and there are "
            f"{', '.join(names)}"
        )


def action_space(values: object) -> ActionSpace:
    """The space that a checkpoint's `"actions"` say. Raises RequestError for values that are
    none."""
    if not isinstance(values, Mapping) or not set(values) <= {"buttons", "axes", "moves"}:
        raise RequestError(f"actions must have buttons, axes and moves alone, got {shown(values)}")
    buttons, axes = (_names(key, values.get(key, ())) for key in ("buttons", "axes"))
    moves = values.get("moves", {})
    if not isinstance(moves, Mapping) or not set(moves) <= set(buttons):
        raise RequestError(f"moves must be of the buttons {list(buttons)}, got {shown(moves)}")
    ways = {str(name): _pair(f"the move of {name!r}", way) for name, way in moves.items()}
    return ActionSpace(buttons, axes, MappingProxyType(ways))


def pack_log(actions: Iterable[tuple[Action, int]]) -> list[list[Any]]:
    """Runs of actions as JSON: `[[action, times], ...]`."""
    return [[action.to_json(), count] for action, count in actions]


def unpack_log(values: Any) -> list[tuple[Action, int]]:
    """Reads `pack_log` back. Raises ActionError."""
    runs = []
    for run in values if isinstance(values, list) else [values]:
        if not isinstance(run, list) or len(run) != 2:
            raise ActionError(f"a run of actions is [action, times], got {shown(run)}")
        count = integer("the times of an action", run[1], 0)
        if count < 1:
            raise ActionError(f"an action is done once at least, got {count}")
        runs.append((Action.from_json(run[0]), count))
    return runs


def _names(key: str, values: object) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise RequestError(f"{key} must be names, got {shown(values)}")
    names = tuple(values)
    plain = all(isinstance(n, str) and n and not set(n) & set(" \t\n*+=") for n in names)
    if not plain or len(set(names)) < len(names):
        raise RequestError(
            f"{key} must be different names without blanks and without * + =, got {shown(values)}"
        )
    return names


def _pair(name: str, value: object) -> tuple[float, float]:
    """Two numbers, down and right."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ActionError(f"{name} must be two numbers, down and right, got {shown(value)}")
    numbers = tuple(value)
    if len(numbers) != 2:
        raise ActionError(f"{name} must be two numbers, down and right, got {shown(numbers)}")
    return _number(name, numbers[0]), _number(name, numbers[1])


def _number(name: str, value: object) -> float:
    try:
        return finite(name, value, None)
    except RequestError as error:
        raise ActionError(str(error)) from None
