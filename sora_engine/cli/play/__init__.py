"""`sora play`: worlds that are driven while they are made."""

from __future__ import annotations

from sora_engine.cli.play.command import play

__all__ = ["play"]
