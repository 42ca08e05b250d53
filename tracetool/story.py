"""One finding on the terminal: which one is meant, its story, and the lines of Python that show its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from replay.declare import UsageError
from replay.sink import KEEP
from replay.systems import SYSTEMS
from tracetool.replaying import Choice, Settings, checkable, choose, replay_dataset
from tracetool.report import console, recorded, stories, verdict
from tracetool.report.verdict import finding_id
from tracetool.results import fold
from tracetool.store import Dataset
from tracetool.terminal import clean

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Chosen", "document", "find", "listing", "python_lines", "told"]

#: Width of a story in characters.
WIDTH: Final = 100
#: Episodes that the listing shows.
LISTED: Final = 200
#: Without recorded evidence, the Python lines show events from so long before the finding (ns).
AROUND: Final = 5_000_000


@dataclass(frozen=True, slots=True)
class Chosen:
    """A finding that was asked for: its run, its episode, and all runs of its system for comparison."""

    id: str
    run: Mapping[str, Any]
    group: Sequence[Mapping[str, Any]]
    runs: Sequence[Mapping[str, Any]]

    @property
    def first(self) -> Mapping[str, Any]:
        """The finding that opened the episode."""
        return self.group[0]


def find(
    dataset: Dataset,
    name: str,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    own: Sequence[Choice] = (),
    recorded: Mapping[str, str] | None = None,
    keep: int = KEEP,
) -> Chosen:
    """The episode that `system:policy:episode` or a code (its first episode) names; UsageError when there is none.

    `own`: policies of the user's that the name may mean; `values`, `recorded` and `keep` as in `Settings`.
    """
    given = Settings((), (), values or {}, recorded or {}, keep)
    system, policy, episode = _parsed(name, own)
    if not system:
        return _first_of(dataset, name, given, own)
    mine = [c for c in own if c.system == system and c.name == policy]
    runs = replay_dataset(dataset, replace(given, policies=(*mine, *_compared(system, policy)), systems=(system,)))
    run = next((r for r in runs if r["policy"] == policy), None)
    group = [f for f in run["findings"] if f["episode"] == episode] if run else []
    if run is None or not group:
        count = max((f["episode"] for f in run["findings"]), default=0) if run else 0
        there = f"episodes 1 to {count}" if count else "no findings"
        raise UsageError(
            f"no finding {name!r}: {system} under {policy} has {there}; "
            "list them: tracetool explain DATASET"
        )
    return Chosen(finding_id(run, group[0]), run, group, runs)


def _parsed(name: str, own: Sequence[Choice]) -> tuple[str, str, int]:
    """(system, policy, episode), or ("", "", 0) for a code."""
    parts = name.split(":")
    if len(parts) == 1:
        return "", "", 0
    if len(parts) != 3 or parts[0] not in SYSTEMS or not parts[2].isdecimal():
        raise UsageError(f"{name!r} is no finding: expected system:policy:episode, such as hpet:current:3, or a code")
    system, policy, episode = parts[0], parts[1], int(parts[2])
    if any(c.system == system and c.name == policy for c in own):
        return system, policy, episode
    try:
        return system, SYSTEMS[system].policy(policy), episode
    except UsageError as error:
        raise UsageError(f"{error}; if it is a class of yours, give its file: --policy ./FILE.py:{policy}") from None


def _compared(system: str, policy: str) -> tuple[Choice, ...]:
    """The policy asked for, then those that a reader wants to see beside it; each once."""
    declared = SYSTEMS[system]
    wanted = [policy, declared.recorded, *(declared.roles.get(r, r) for r in ("current", "proposed"))]
    return tuple(Choice(name, system) for name in dict.fromkeys(wanted) if name in declared.policies)


def _first_of(dataset: Dataset, code: str, given: Settings, own: Sequence[Choice]) -> Chosen:
    """The worst, then earliest, episode of a code: in what was recorded, else in what a policy of the user's or the
    proposed one predicts."""
    systems = [n for n in checkable(dataset) if any(c.name == code for c in SYSTEMS[n].codes)]
    for choice in (choose("current"), *own, choose("proposed")):
        for system in systems:
            for run in replay_dataset(dataset, replace(given, policies=(choice,), systems=(system,))):
                for group in fold(run["findings"]):
                    if group[0]["code"] == code:
                        name = finding_id(run, group[0])
                        return find(dataset, name, given.values, own=own, recorded=given.recorded, keep=given.keep)
    raise UsageError(f"no finding {code!r} in this recording; list what was found: tracetool explain DATASET")


# -- text ----------------------------------------------------------------------------------------------------------


def _told(dataset: Dataset, chosen: Chosen) -> tuple[stories.Story, Any]:
    """The story as all reports tell it."""
    times = recorded.times_of(dataset.manifest)
    # Reports compare only their first episodes with the other runs: let this one be the first, and in a run that was
    # verified the only one.
    alone = {**chosen.run, "findings": list(chosen.group)}
    runs = [alone, *(r for r in chosen.runs if r is not chosen.run)]
    told = stories.stories(runs, times, gaps=dataset.gaps(), only_primary=alone["mode"] == "verify")
    story = next(s for s in told if s.run is alone)
    return story, times


def told(dataset: Dataset, chosen: Chosen) -> Text:
    """The story for a terminal, wrapped."""
    story, times = _told(dataset, chosen)
    return console.story(story, times, width=WIDTH)


def document(dataset: Dataset, chosen: Chosen) -> dict[str, Any]:
    """`explain DATASET FINDING --json`."""
    story, times = _told(dataset, chosen)
    code = story.code
    return {
        "schema": 1,
        "finding": chosen.id,
        "mode": chosen.run["mode"],
        "horizon_ns": chosen.run["horizon_ns"],
        "title": story.title,
        "occurrences": len(chosen.group),
        "first": dict(chosen.first),
        "doc": code.doc if code else "",
        "cause": code.cause if code else "",
        "source": code.source if code else "",
        "events": [{**asdict(s), "dt_ns": s.t_ns - chosen.first["t_ns"]} for s in story.steps],
        "gap": story.gap,
        "other_policies": [asdict(o) for o in story.others],
        "facts": dict(story.facts),
        "evidence_is": verdict.reliable(chosen.run, chosen.first["t_ns"], times),
        "python": python_lines(dataset, chosen),
    }


def listing(runs: Sequence[Mapping[str, Any]], dataset: Dataset) -> tuple[list[dict[str, Any]], str]:
    """Every episode with the name under which it can be explained: (records, text)."""
    times = recorded.times_of(dataset.manifest)
    found = stories.stories(runs, times, only_primary=False)
    records = [
        {
            "finding": s.id, "severity": s.severity, "title": s.title, "t_ns": s.first["t_ns"],
            "occurrences": len(s.findings), "predicted": s.predicted,
        }
        for s in found
    ]  # fmt: skip
    width = max((len(r["finding"]) for r in records), default=0)
    lines = [
        f"{r['finding'].ljust(width)}  {r['severity']:<5}  {times.at(r['t_ns'])}  {r['title']}"
        for r in records[:LISTED]
    ]
    if len(records) > LISTED:
        lines.append(f"and {len(records) - LISTED} more: --json, or query 'SELECT * FROM findings'")
    return records, "\n".join(map(clean, lines)).replace("\u202f", " ") or "no findings"


# -- Python --------------------------------------------------------------------------------------------------------


def python_lines(dataset: Dataset, chosen: Chosen) -> list[str]:
    """Polars lines that show a finding's evidence: canonical events in `evidence`, the raw records in `records`.

    They need nothing but polars and the dataset. A finding without recorded evidence (predicted, or one that follows
    from the absence of records) gets the events of its object that led up to it.
    """
    first = chosen.first
    seqs = sorted({e["seq"] for e in first["evidence"] if e.get("seq") is not None and e["seq"] >= 0})
    lines = [
        "import polars as pl",
        f"dataset = {str(Path(dataset.path).absolute())!r}",
        'events = pl.scan_parquet(dataset + "/events.parquet", glob=False)',
        *_where(chosen, seqs),
        'evidence = evidence.unnest("origin").sort("seq").collect()',
        "print(evidence)",
    ]
    if not seqs:
        return lines
    tables = dataset.manifest["tables"]
    raw: dict[str, list[int]] = {}
    for name, offset in _origins(dataset, seqs):
        if name in tables:
            raw.setdefault(name, []).append(offset)
    lines.append("records = {}")
    for name, offsets in sorted(raw.items()):
        file = f"/records/{tables[name]['file']}.parquet"
        lines.append(
            f"records[{name!r}] = pl.scan_parquet(dataset + {file!r}, glob=False)"
            f'.filter(pl.col("offset").is_in({sorted(set(offsets))})).collect()'
        )
    lines += ["for name, found in records.items():", "    print(name, found)"]
    return lines


def _where(chosen: Chosen, seqs: Sequence[int]) -> list[str]:
    first = chosen.first
    if seqs:
        return [f'evidence = events.filter(pl.col("seq").is_in({list(seqs)}))']
    start = first["t_ns"] - AROUND if first.get("t_first_ns") is None else first["t_first_ns"]
    kinds = list(SYSTEMS[chosen.run["system"]].kinds)
    out = [
        f"kinds = {kinds!r}",
        f'evidence = events.filter(pl.col("t_ns").is_between({start}, {first["t_ns"]}), '
        'pl.col("kind").cast(pl.String).is_in(kinds))',
    ]
    for name in ("dom", "vcpu", "obj", "cpu"):
        if first.get(name) is not None:
            # A kind that does not carry the column is kept: it may be what the finding is about.
            test = f'(pl.col("{name}") == {first[name]}) | pl.col("{name}").is_null()'
            out.append(f"evidence = evidence.filter({test})")
    return out


def _origins(dataset: Dataset, seqs: Sequence[int]) -> list[tuple[str, int]]:
    """(record table, offset) of canonical events."""
    import polars as pl

    origin = pl.col("origin").struct
    frame = (
        dataset.events()
        .filter(pl.col("seq").is_in(list(seqs)))
        .select(origin.field("raw_kind").cast(pl.String), origin.field("offset"))
        .collect()
    )
    return [(name, offset) for name, offset in frame.iter_rows() if name is not None and offset is not None]
