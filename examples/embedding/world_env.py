"""A world as an environment in Gymnasium's form: `python world_env.py path/to/a/world`.

`reset` and `step` take and return what Gymnasium's `Env` does, and nothing of Gymnasium is needed.
What an agent is rewarded for is up to who embeds it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

import sora_engine as sora

Reward = Callable[[np.ndarray, np.ndarray], float]
"""What a step is worth, of the frame before it and the one after: uint8 `[height, width, 3]`."""


class Buttons:
    """A space of whole numbers: 0 does nothing, and n presses the nth button."""

    def __init__(self, names: tuple[str, ...], seed: int | None = None) -> None:
        self.names, self.n = names, len(names) + 1
        self._random = random.Random(seed)

    def sample(self) -> int:
        return self._random.randrange(self.n)

    def contains(self, action: object) -> bool:
        return isinstance(action, (int, np.integer)) and 0 <= action < self.n

    def action(self, number: int) -> sora.Action:
        if not self.contains(number):
            raise ValueError(f"action {number!r} is none of 0 to {self.n - 1}: {self.names}")
        return sora.Action(self.names[number - 1]) if number else sora.Action()


class WorldEnv:
    """One episode after the other, each a session of its own.

    request: what the world is. reset's `options` may hold another prompt. max_steps: after which an
    episode is cut off (`truncated`); a world has no end of its own, so `terminated` is never True.
    An observation is the newest frame, uint8 `[height, width, 3]`; `info["frames"]` has all that
    the step made, and `info["place"]` where the view lies, in pixels.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(
        self,
        engine: sora.Engine,
        request: sora.SessionRequest | None = None,
        *,
        reward: Reward | None = None,
        max_steps: int = 200,
    ) -> None:
        self._engine, self._request = engine, request or sora.SessionRequest()
        self._reward, self._max_steps = reward or (lambda before, after: 0.0), max_steps
        self._world: sora.Session | None = None
        self._steps = 0
        driving = engine.loaded_model.driving
        self.action_space = Buttons(() if driving is None else driving.actions.buttons)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode. The same seed begins the same one; the session's own where it is None."""
        self.close()
        changes: dict[str, Any] = {} if seed is None else {"seed": seed}
        if options and "prompt" in options:
            changes["prompt"] = options["prompt"]
        names = sora.SessionRequest.__slots__
        values = {name: getattr(self._request, name) for name in names} | changes
        self._world = self._engine.open_session(sora.SessionRequest(**values))
        self._steps = 0
        return self.render(), self._info(self._world.frames)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Press a button for one latent frame: observation, reward, terminated, truncated, info."""
        world, before = self._open(), self.render()
        frames = world.step(self.action_space.action(action))
        self._steps += 1
        after = frames[-1]
        reward = self._reward(before, after)
        return after, reward, False, self._steps >= self._max_steps, self._info(frames)

    def render(self) -> np.ndarray:
        """The newest frame."""
        return self._open().frames[-1]

    def close(self) -> None:
        """End the episode."""
        if self._world is not None:
            self._world.close()
            self._world = None

    @property
    def unwrapped(self) -> WorldEnv:
        return self

    def _open(self) -> sora.Session:
        if self._world is None:
            raise RuntimeError("reset begins an episode; there is none")
        return self._world

    def _info(self, frames: np.ndarray) -> dict[str, Any]:
        world = self._open()
        return {"frames": frames, "place": world.place, "seed": world.seed, "step": self._steps}


def main(model: str = "meadow", steps: int = 20) -> float:
    """An agent that does anything at all, and is paid for every pixel that changes."""

    def change(before: np.ndarray, after: np.ndarray) -> float:
        return float((before != after).any(axis=-1).mean())

    with sora.Engine.from_pretrained(model) as engine:
        env, total = WorldEnv(engine, reward=change, max_steps=int(steps)), 0.0
        _, info = env.reset(seed=7)
        truncated = False
        while not truncated:
            _, reward, _, truncated, info = env.step(env.action_space.sample())
            total += reward
        print(f"{info['step']} steps, at {info['place']}: {total:.2f}")
        env.close()
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
