"""What a command was asked to do, checked: the target, how to read it, what to replay, when to fail."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from replay.declare import UsageError
from replay.sink import KEEP
from tracetool import cache, exits, terminal
from tracetool.answers import Answers
from tracetool.ingest import Ingested, IngestOptions, parse_offset
from tracetool.replaying import Settings, choose, choose_recorded, replay_dataset
from tracetool.results import SEVERITIES, worst
from tracetool.settings import load_event_map, load_values
from tracetool.store import Dataset

__all__ = ["Request", "check_severity", "exit_code", "ingest_options", "open_dataset", "replayed", "say_damage"]


@dataclass(frozen=True, slots=True)
class Request:
    """A replay as asked for on the command line."""

    target: str
    policies: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    config: Path | None = None
    options: IngestOptions = field(default_factory=IngestOptions)
    recorded: tuple[str, ...] = ()
    jobs: int | None = None
    keep: int | None = None

    def values(self) -> Mapping[str, Mapping[str, Any]]:
        """Parameter values by system, from the file and from `--set`."""
        return load_values(self.sets, self.config)

    def settings(self) -> Settings:
        """Policies and systems to replay (default: what was recorded); UsageError for what does not exist."""
        policies = tuple(choose(p) for p in self.policies or ("current",))
        recorded = choose_recorded(self.recorded)
        return Settings(policies, self.systems, self.values(), recorded, self.keep or KEEP)


# -- options -------------------------------------------------------------------------------------------------------


def ingest_options(
    cpu_hz: str | None = None,
    xen_version: str | None = None,
    format: str | None = None,
    hpet_irqs: str | None = None,
    event_map: Path | None = None,
    *,
    force: bool = False,
    offsets: Sequence[str] = (),
    only: Sequence[str] = (),
) -> IngestOptions:
    """Checked options; UsageError names the one that is wrong."""
    return IngestOptions(
        cpu_hz=_hz(cpu_hz),
        xen_version=_version(xen_version),
        format=format,
        hpet_irqs=_numbers(hpet_irqs),
        force=force,
        command="tracetool " + " ".join(sys.argv[1:]),
        offsets=tuple(parse_offset(text) for text in offsets),
        event_map=load_event_map(event_map),
        only=frozenset(name.strip() for names in only for name in names.split(",") if name.strip()),
    )


_SCALES: Final = {"k": 1e3, "m": 1e6, "g": 1e9}


def _hz(text: str | None) -> float | None:
    if text is None:
        return None
    scale = _SCALES.get(text[-1:].lower(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 1e3 <= value <= 1e11:
        raise UsageError(f"--cpu-hz wants a frequency such as 2400000000 or 2.4G, not {text!r}")
    return value


def _version(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, dot, minor = text.partition(".")
    if not dot or not major.isdigit() or not minor.isdigit():
        raise UsageError(f"--xen-version wants a version such as 4.17, not {text!r}")
    return int(major), int(minor)


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part, 0) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--hpet-irqs wants interrupt numbers such as 24,25,26, not {text!r}") from None


def check_severity(fail_on: str) -> None:
    """UsageError unless `--fail-on` is a severity or never."""
    if fail_on not in (*SEVERITIES, "never"):
        raise UsageError(f"--fail-on wants error, warn, info or never, not {fail_on!r}")


# -- work ----------------------------------------------------------------------------------------------------------


def open_dataset(target: str, options: IngestOptions) -> Dataset:
    """The dataset of a target (`cache.dataset_of`), with a progress bar; damage is said on stderr."""
    with terminal.progress_bar() as bar:
        return cache.dataset_of(target, options, bar, say_damage)


def say_damage(ingested: Ingested) -> None:
    """What could not be read of a recording, on stderr."""
    for note in ingested.notes:
        if note["severity"] == "error":
            terminal.error(f"{note['source']}: offset {note['offset']}: {note['text']}; the rest was kept")


def replayed(dataset: Dataset, settings: Settings, jobs: int | None = None) -> list[dict[str, Any]]:
    """Run records of a replay, with a progress bar. `jobs` is processes at most, None what is worth it."""
    with terminal.progress_bar() as bar:
        runs = replay_dataset(dataset, settings, bar, jobs=jobs, answers=Answers.of(dataset.path))
    # Two names may mean one policy: what is current is also what was proposed once.
    once = {(r["system"], r["policy"], r["mode"]): r for r in reversed(runs)}
    return [r for r in runs if once[r["system"], r["policy"], r["mode"]] is r]


def exit_code(runs: Sequence[Mapping[str, Any]], fail_on: str, *, damaged: bool, asked: bool = True) -> int:
    """Exit code of a replay: findings first, then damage, then ignorance. A system that was not asked for by name and
    that the recording hardly shows (`seen`) counts only when there is no other."""
    found = worst(runs)
    if fail_on != "never" and found is not None and SEVERITIES.index(found) <= SEVERITIES.index(fail_on):
        return exits.FINDINGS
    if damaged:
        return exits.UNREADABLE
    judged = runs if asked else [r for r in runs if (r.get("seen") or {}).get("state") in (None, "full", "partial")]
    if not judged or any(r["verdict"] == "inconclusive" for r in judged):
        return exits.INCONCLUSIVE
    return exits.CLEAN
