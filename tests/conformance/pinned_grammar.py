"""Vocabulary of the random streams in `pinned.py`: phrases of events, each field with the values it may have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["GRAMMAR", "SETTINGS", "STEPS", "Setting"]

PHRASES: Final = Path(__file__).with_name("pinned") / "phrases.txt"

Pool = tuple[int | str | None, ...]
Phrase = tuple[tuple[str, dict[str, Pool]], ...]


def _phrase(words: str) -> Phrase:
    """`kind field=a|b|- field==; kind ...`: values are integers, `-` is none, `=` that of the event before."""
    parts = []
    for part in words.split(";"):
        kind, *given = part.split()
        pools: dict[str, Pool] = {}
        for one in given:
            name, _, values = one.partition("=")
            pools[name] = tuple({"-": None, "=": "="}[v] if v in "-=" else int(v, 0) for v in values.split("|"))
        parts.append((kind, pools))
    return tuple(parts)


#: Nanoseconds between events.
STEPS: Final[dict[str, tuple[int, ...]]] = {
    "hpet": (0, 100, 500, 2_000, 20_000, 60_000, 200_000, 5_000_000),
    "callback": (0, 0, 100, 500, 1_000, 5_000, 20_000, 150_000),
    "vgic": (0, 0, 100, 500, 1_000, 4_000, 60_000, 200_000, 20_000_000),
    "irqflow": (0, 0, 50, 100, 3_000, 10_000, 60_000, 20_000_000),
    "evtchn": (0, 0, 20, 100, 1_000, 9_950, 20_000, 200_000),
    "apic": (0, 0, 10, 300, 40_000, 700_000, 12_000_000),
    "gic": (0, 10, 300, 40_000, 12_000_000),
}


def _grammar() -> dict[str, tuple[Phrase, ...]]:
    phrases: dict[str, list[Phrase]] = {}
    for line in PHRASES.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            phrases[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            phrases[list(phrases)[-1]].append(_phrase(line))
    return {system: tuple(some) for system, some in phrases.items()}


GRAMMAR: Final = _grammar()

@dataclass(frozen=True, slots=True)
class Setting:
    """Configuration, initial state and variant of a machine that is fed with streams; `phrases` if not its system's."""

    config: dict[str, Any] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)
    sub: str = ""
    phrases: str = ""
    policies: tuple[str, ...] = ()


#: One after the other.
SETTINGS: Final[dict[str, tuple[Setting, ...]]] = {
    "hpet": (
        Setting({"n_channels": 2, "n_cpus": 4}),
        Setting({"n_channels": 1, "n_cpus": 4, "stack_limit": 1}),
        Setting({"n_cpus": 4}, sub="mwait", phrases="mwait"),
    ),
    "callback": (Setting(), Setting({"late_assert_ns": 1_000, "apic_id_stride": 2})),
    "vgic": (Setting({"vcpus": 3}), Setting({"vcpus": 3, "nr_lrs": 1, "phys_follows": "fixed"})),
    "irqflow": (Setting(), Setting({"lateeoi_ns": 5_000})),
    "evtchn": (
        Setting(policies=("current", "proposed", "modern")),
        Setting(
            {"bits_per_word": 32}, {"S5": {"pending": [65], "masked": [65, 3]}},
            policies=("current", "proposed", "modern"),
        ),
        Setting(sub="fifo", phrases="fifo", policies=("any",)),
        Setting(sub="mixed", policies=("current", "modern")),
    ),
    "apic": (Setting(), Setting({"nesting_limit": 1, "t_err_ns": 50})),
    "gic": (Setting(), Setting()),
}  # fmt: skip
