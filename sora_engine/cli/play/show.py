"""A feed in a terminal: frames when they are due, two lines below them, and keys."""

from __future__ import annotations

from collections.abc import Callable

from sora_engine.cli.play.feed import Feed
from sora_engine.cli.play.keyboard import Key
from sora_engine.cli.play.screen import BEGIN, END, Layout, Screen
from sora_engine.cli.play.terminal import Terminal

IDLE_S = 0.1
"""How long no key and no frame is waited for at most."""


def show(terminal: Terminal, feed: Feed, press: Callable[[Key], bool]) -> None:
    """Until the feed is over, or `press` returns False for a key. Frames that are late are left
    out. Raises the feed's error."""
    screen: Screen | None = None
    feed.woken = terminal.wake
    size, shown = (0, 0), 0
    while True:
        if terminal.blank or terminal.size() != size:
            terminal.blank, size, screen = False, terminal.size(), None
        sent, seen = "", feed.seen()
        if seen is not None:
            if screen is None:
                screen, shown = Screen(Layout.of(*size, *seen.frame.shape[:2])), 0
                sent = screen.cleared()
            if seen.number != shown:
                sent += screen.drawn(seen.frame)
                shown = seen.number
            sent += screen.texts(lines(feed, screen.layout.lines))
        if sent:
            terminal.write(BEGIN + sent + END)
        due = feed.wait_s(shown)
        if feed.over and due is None:
            break
        for key in terminal.keys(IDLE_S if due is None else min(due, IDLE_S)):
            if not press(key):
                return
    if feed.error is not None:
        raise feed.error


def lines(feed: Feed, count: int) -> list[str]:
    """How it goes; what happened, or else the keys. Of a single line, what happened."""
    status = feed.status
    if count == 1:
        return [status.message or status.text]
    return [status.text, status.message or status.keys]
