"""Which rules a recording can decide: generated from the codes' own declarations, never written by hand.

A rule is `checked` when every kind of event that it needs is recorded, `inferred` when one of them was only
concluded from other records, and `blind` when one is missing. A blind rule never counts as clean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from replay.declare import Code, System

__all__ = ["CHECKED_FROM", "Coverage", "Observation", "coverage"]

#: Confidence (0..100) from which an event counts as recorded rather than inferred (spec M: A = 100, B = 80, C = 50).
CHECKED_FROM: Final = 80


@dataclass(frozen=True, slots=True)
class Observation:
    """How well a recording shows one kind of event: confidence 0..100, and how it is obtained."""

    conf: int
    how: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """State of one rule: "checked", "inferred" or "blind", and why."""

    rule: str
    state: str
    reason: str


def coverage(system: System, observed: Mapping[str, Observation]) -> list[Coverage]:
    """Coverage of every code of a system, in the order of their declaration."""
    return [_rule(code, observed) for code in system.codes]


def _rule(code: Code, observed: Mapping[str, Observation]) -> Coverage:
    weakest: tuple[int, str, str] | None = None
    for need in code.needs:
        best: tuple[int, str, str] | None = None
        for kind in need.split("|"):
            seen = observed.get(kind)
            if seen is not None and seen.conf > 0 and (best is None or seen.conf > best[0]):
                best = (seen.conf, kind, seen.how)
        if best is None:
            return Coverage(code.name, "blind", f"{need.replace('|', ' or ')} is not recorded")
        if weakest is None or best[0] < weakest[0]:
            weakest = best
    if weakest is None:
        return Coverage(code.name, "blind", "the rule declares no events")
    conf, kind, how = weakest
    if conf >= CHECKED_FROM:
        return Coverage(code.name, "checked", f"{kind}: {how}")
    return Coverage(code.name, "inferred", f"{kind} at confidence {conf}: {how}")
