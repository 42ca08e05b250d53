"""Numbers in words for expected/observed texts."""

from __future__ import annotations

__all__ = ["span"]


def span(ns: int) -> str:
    """A duration as people say it: 343.7 us, 12.97 ms, 2.35 s."""
    size = abs(ns)
    for unit, scale in (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000)):
        if size >= scale:
            return f"{ns / scale:.4g} {unit}"
    return f"{ns} ns"
