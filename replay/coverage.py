"""Which rules a recording can decide: generated from the codes' own declarations, never written by hand.

A rule is `checked` when every kind of event that it needs is recorded, `inferred` when one of them was only
concluded from other records or something else had to be assumed, and `blind` when one is missing. A blind rule never
counts as clean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from replay.declare import Code, System

__all__ = ["ASSUMED", "CHECKED_FROM", "Coverage", "Observation", "Sight", "coverage", "sight"]

#: Confidence (0..100) from which an event counts as recorded rather than inferred (spec M: A = 100, B = 80, C = 50).
CHECKED_FROM: Final = 80
#: Confidence of what is assumed in place of a kind that is not recorded.
ASSUMED: Final = 50


@dataclass(frozen=True, slots=True)
class Observation:
    """How well a recording shows one kind of event: confidence 0..100, and how it is obtained."""

    conf: int
    how: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """State of one rule: "checked", "inferred" or "blind", and why; `conf` is that of its weakest kind of event."""

    rule: str
    state: str
    reason: str
    conf: int = 100


@dataclass(frozen=True, slots=True)
class Sight:
    """How much of a system a recording shows, over all its rules.

    `state` is "full" (no rule is blind), "partial", "inconclusive" (the key rules, those declared as errors, are all
    blind: finding nothing says nothing of a broken property) or "blind" (no rule can be decided).
    """

    state: str
    checked: int
    inferred: int
    blind: int
    key_blind: tuple[str, ...]

    @property
    def decides(self) -> bool:
        """Whether "nothing found" may be called clean."""
        return self.state in ("full", "partial")

    def words(self, findings: int = 0) -> str:
        """One sentence: what the silence of the rules is worth."""
        total = self.checked + self.inferred + self.blind
        seen = total - self.blind
        if not seen:
            return f"none of the {total} rules could be seen"
        found = "nothing found" if not findings else f"{findings} findings"
        rest = f"; the other {self.blind} could not be seen" if self.blind else ""
        key = ", among them every rule for an error" if self.state == "inconclusive" else ""
        guess = f", {self.inferred} of them inferred" if self.inferred else ""
        return f"{found} by {seen} of {total} rules{guess}{rest}{key}"


def sight(system: System, rules: Sequence[Coverage]) -> Sight:
    """Sum of the coverage of a system's rules; without any (a scenario) everything is there."""
    states = {c.rule: c.state for c in rules} or {code.name: "checked" for code in system.codes}
    checked, inferred, blind = (
        sum(s == state for s in states.values()) for state in ("checked", "inferred", "blind")
    )
    key = [code.name for code in system.codes if code.severity == "error"]
    key_blind = tuple(name for name in key if states.get(name) == "blind")
    if blind == len(states):
        state = "blind"
    elif key and len(key_blind) == len(key):
        state = "inconclusive"
    else:
        state = "partial" if blind else "full"
    return Sight(state, checked, inferred, blind, key_blind)


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
    for missing, assumption in code.assumes.items():
        if missing not in observed:
            return Coverage(code.name, "inferred", f"{missing} is not recorded: {assumption}", min(conf, ASSUMED))
    if conf >= CHECKED_FROM:
        return Coverage(code.name, "checked", f"{kind}: {how}", conf)
    return Coverage(code.name, "inferred", f"{kind} at confidence {conf}: {how}", conf)
