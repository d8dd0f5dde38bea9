"""What keys of a terminal do in a world."""

from __future__ import annotations

from collections.abc import Sequence

from sora_engine.cli.play.keyboard import AWAY, SPEAKS, Act, Key
from sora_engine.cli.play.player import COMMANDS, Player

ARROWS = ("up", "down", "left", "right")
FOR_SPACE = ("act", "jump", "use")
"""Buttons that the space bar is, the first that there is; else the first without a key."""


def bindings(buttons: Sequence[str]) -> dict[str, str]:
    """By key the button: arrows and letters by their names, space, then digits in order."""
    found = {name: name for name in buttons if name in ARROWS}
    found |= {
        name: name
        for name in buttons
        if len(name) == 1 and name not in COMMANDS and not name.isdigit()
    }
    left = [name for name in buttons if name not in found.values()]
    if left:
        space = next((name for name in FOR_SPACE if name in left), left[0])
        found["space"] = space
        left.remove(space)
    return found | dict(zip("123456789", left, strict=False))


def help_line(bound: dict[str, str]) -> str:
    """The keys and what they do, in a line."""
    arrows = [key for key in bound if key in ARROWS]
    parts = ["arrows"] if arrows else []
    parts += [
        f"{key} {button}" if key != button else key
        for key, button in bound.items()
        if key not in ARROWS
    ]
    return ", ".join([*parts, *(f"{key} {command}" for key, command in COMMANDS.items())])


class Hands:
    """Keys as they come, for a player. A key that is held goes on being held: where a terminal
    tells of releases, until then, and else for as long as it repeats."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self._bound = bindings(player.world.actions.buttons)
        self._releases = False
        player.status.keys = help_line(self._bound)

    def press(self, key: Key) -> bool:
        """Do what the key says; False for the one that ends the game."""
        keys = self._player.keys
        if key.name == SPEAKS:
            self._releases = True
        elif key.name == AWAY:
            keys.release(*self._bound.values())
        elif (button := self._bound.get(key.name)) is not None:
            if key.act is Act.RELEASE:
                keys.release(button)
            elif self._releases:
                if key.act is Act.PRESS:
                    keys.tap(button)  # one that is released at once counts, too
                    keys.press(button)
            else:
                keys.tap(button)
        elif (command := COMMANDS.get(key.name)) is not None and key.act is Act.PRESS:
            if command == "quit":
                return False
            self._player.do(command)
        return True
