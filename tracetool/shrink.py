"""The few events of a recording that still show a finding, as a scenario and a test.

Delta debugging (Zeller's ddmin) over canonical events. A sub-recording counts only if the same rule fires at the same
moment, on the same object, with the same words, both ways: as a recording whose beginning is unknown, and as a
scenario, which is complete by convention. The events that the finding names as its evidence and all markers stay, so
that it cannot turn into another finding of the same code.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from replay.declare import Config, System, UsageError
from replay.driver import Run, run_machine
from replay.events import KIND_ID, KINDS, NIL, NONE
from replay.generic import CODES as GENERIC_CODES
from replay.scenario import parse_scenario, run_scenario
from replay.sink import Finding
from replay.systems import SYSTEMS
from tracetool.output import whole_files
from tracetool.replaying import observations
from tracetool.store import Dataset
from tracetool.story import Chosen
from tracetool.terminal import clean

__all__ = ["Case", "ddmin", "shrink_finding", "write_case"]

#: Events before the finding that are looked at.
REACH: Final = 1 << 20
#: Events of the first, smallest window that is tried.
WINDOW: Final = 32

_COLUMNS: Final = (
    "seq", "t_ns", "t_err_ns", "kind", "role", "cpu", "dom", "vcpu", "obj", "tgt", "val", "val2", "flags", "conf",
    "origin",
)  # fmt: skip
#: Keys of a scenario's event that are left out when they say nothing.
_OPTIONAL: Final = ("cpu", "dom", "vcpu", "obj", "tgt", "val", "val2")


@dataclass(frozen=True, slots=True)
class Case:
    """A shrunk finding: `scenario` is its JSON object; `kept` of `events`; `minimal` if time sufficed."""

    finding: str
    signature: Mapping[str, Any]
    scenario: Mapping[str, Any]
    kept: int
    events: int
    tests: int
    minimal: bool
    source: str

    def numbers(self) -> dict[str, Any]:
        """For `shrink --json`."""
        return {
            "finding": self.finding, "signature": dict(self.signature), "events": self.kept, "of": self.events,
            "replays": self.tests, "minimal": self.minimal,
        }  # fmt: skip

    def summary(self) -> str:
        """For people, one line."""
        how = "no single event can be left out" if self.minimal else "time ran out: give more --seconds"
        return f"{self.finding}: {self.kept} of {self.events} events after {self.tests} replays; {how}"


def ddmin(items: Sequence[int], holds: Callable[[Sequence[int]], bool], go_on: Callable[[int], bool]) -> tuple[
    list[int], bool
]:  # fmt: skip
    """A part of `items` for which `holds`, from which no single item can be left out; in order.

    `go_on` is told how many are left. Second value: whether that was reached before it said no. `holds(items)` must be
    true.
    """
    current = list(items)
    parts = 2
    if current and holds([]):
        return [], True
    while len(current) >= 2:
        size = -(-len(current) // parts)
        chunks = [current[i : i + size] for i in range(0, len(current), size)]
        smaller = None
        for index in range(len(chunks)):
            if not go_on(len(current)):
                return current, False
            rest = [x for j, chunk in enumerate(chunks) if j != index for x in chunk]
            if holds(rest):
                smaller = rest
                break
        if smaller is not None:
            current, parts = smaller, max(parts - 1, 2)
        elif parts >= len(current):
            return current, True
        else:
            parts = min(parts * 2, len(current))
    return current, True


class _Replays:
    """Replays subsets of the events and says whether the finding is still there."""

    def __init__(
        self, dataset: Dataset, chosen: Chosen, frame: pl.DataFrame, settings: Mapping[str, Any], end: int
    ) -> None:
        self.system: System = SYSTEMS[chosen.run["system"]]
        self.policy = str(chosen.run["policy"])
        self.closed = chosen.run["mode"] != "verify"
        self.config = Config(self.system.parameters, settings)
        self.observed = frozenset(observations(dataset))
        self.wanted = _words(chosen.first)
        self.frame = frame
        self.end = end
        self.count = 0

    def holds(self, rows: Sequence[int]) -> bool:
        """Whether these rows of the frame show the finding, as a recording and as a scenario."""
        table = self.frame[np.asarray(rows, dtype=np.int64)].to_arrow()
        return all(
            any(_words_of(f) == self.wanted for f in self._run(table, boot, seen).findings)
            for boot, seen in ((True, None), (False, self.observed))
        )

    def _run(self, table: Any, boot: bool, seen: frozenset[str] | None) -> Run:
        self.count += 1
        return run_machine(
            self.system, self.policy, [table], config=self.config, closed=self.closed, t_end=self.end,
            from_boot=boot, observed=seen,
        )  # fmt: skip


_PLACE: Final = ("cpu", "dom", "vcpu", "obj")


def _words(finding: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must stay the same, of a finding in a run record."""
    return (
        finding["code"], finding["severity"], finding["t_ns"], *(finding[k] for k in _PLACE),
        finding["expected"], finding["observed"],
    )  # fmt: skip


def _words_of(finding: Finding) -> tuple[Any, ...]:
    """The same of a finding fresh from the machine."""
    place = [getattr(finding, k) for k in _PLACE]
    return (
        finding.code.name, finding.severity, finding.t, *(None if v in (NONE, NIL) else v for v in place),
        finding.expected, finding.observed,
    )  # fmt: skip


def _load(dataset: Dataset, kinds: Sequence[str], end: int) -> pl.DataFrame:
    """The last `REACH` events of these kinds up to `end`."""
    frames: list[pl.DataFrame] = []
    for table in dataset.event_batches(list(kinds), _COLUMNS):
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        part = frame.filter(pl.col("t_ns") <= end).select(_COLUMNS)
        if not part.height:
            break
        frames.append(part.with_columns(pl.col("kind", "role").cast(pl.String)))
        while len(frames) > 1 and sum(f.height for f in frames[1:]) >= REACH:
            frames.pop(0)
    return pl.concat(frames).tail(REACH) if frames else pl.DataFrame()


def _kinds(system: System, closed: bool) -> tuple[str, ...]:
    """Kinds that a run of this mode is fed (the same as a replay of the dataset)."""
    if not closed:
        return system.kinds
    if system.stimuli is not None:
        return system.stimuli
    fed = ("stimulus", "context", "response", "marker")
    return tuple(k for k in system.kinds if KINDS[KIND_ID[k]].role in fed)


def shrink_finding(
    dataset: Dataset,
    chosen: Chosen,
    name: str,
    values: Mapping[str, Mapping[str, Any]],
    *,
    seconds: float = 30.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Case:
    """Shrink the first finding of an episode; the result is the same every time unless `seconds` run out.

    `progress` is called with what is done, how many events are out, and of how many that might be.

    UsageError when the finding cannot be shown by a part of the recording: it then rests on the whole of it.
    """
    if not seconds > 0:
        raise UsageError(f"--seconds wants a time above 0, not {seconds:g}")
    first, run = chosen.first, chosen.run
    if first["code"] in {code.name for code in GENERIC_CODES}:
        raise UsageError(f"{first['code']} comes from comparing whole runs, not from one rule; it cannot be shrunk")
    deadline = time.monotonic() + seconds
    system = SYSTEMS[run["system"]]
    if run["policy"] not in system.policies:
        raise UsageError(f"{run['policy']} is not a policy that the tool has; a test could not name it")
    closed = run["mode"] != "verify"
    settings = {
        **dataset.manifest.get("facts", {}).get(f"{system.name}_config", {}), **values.get(system.name, {}),
    }  # fmt: skip
    last = int(dataset.manifest["span"]["t1_ns"])
    replays, rows = _whole(dataset, chosen, system, settings, closed, sorted({first["t_ns"], last}))
    fixed, free = _split(replays.frame, rows, first)

    def holds(part: Sequence[int]) -> bool:
        return replays.holds(sorted([*fixed, *part]))

    def go_on(left: int) -> bool:
        if progress:
            progress("shrinking", len(free) - left, len(free))
        return time.monotonic() < deadline

    kept, minimal = ddmin(free, holds, go_on)
    final = sorted([*fixed, *kept])
    final = _without_strangers(replays, final, first)
    scenario = _scenario(dataset, chosen, name, replays, final, settings)
    return Case(
        finding=chosen.id,
        signature=scenario["policies"][run["policy"]]["divergences"][scenario["finding"]],
        scenario={k: v for k, v in scenario.items() if k != "finding"},
        kept=len(final),
        events=int(dataset.manifest["events"]),
        tests=replays.count,
        minimal=minimal,
        source=str(dataset.manifest["inputs"][0]["source"]),
    )


def _whole(
    dataset: Dataset, chosen: Chosen, system: System, settings: Mapping[str, Any], closed: bool, ends: Sequence[int]
) -> tuple[_Replays, list[int]]:
    """A window that shows the finding: the shortest of 32, 64, … events, up to the earliest end that works."""
    kinds = _kinds(system, closed)
    evidence = [e["seq"] for e in chosen.first["evidence"] if e.get("seq") is not None and e["seq"] >= 0]
    for end in ends:
        frame = _load(dataset, kinds, end)
        if not frame.height:
            continue
        replays = _Replays(dataset, chosen, frame, settings, end)
        oldest = frame["seq"].search_sorted(min(evidence)) if evidence else frame.height
        size = WINDOW
        while True:
            start = max(0, min(frame.height - size, int(oldest)))
            rows = list(range(start, frame.height))
            if replays.holds(rows):
                return replays, rows
            if start == 0:
                break
            size *= 4
    raise UsageError(
        f"{chosen.id} cannot be cut out: replayed as a scenario, the recording up to it does not show it"
    )


def _split(frame: pl.DataFrame, rows: Sequence[int], first: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Rows that must stay (markers, context, evidence) and rows that may go."""
    evidence = {e["seq"] for e in first["evidence"] if e.get("seq") is not None}
    seqs, roles = frame["seq"].to_list(), frame["role"].to_list()
    fixed = [i for i in rows if roles[i] in ("marker", "context") or seqs[i] in evidence]
    held = set(fixed)
    return fixed, [i for i in rows if i not in held]


def _without_strangers(replays: _Replays, rows: list[int], first: Mapping[str, Any]) -> list[int]:
    """Context of CPUs and vCPUs that nothing else in the case mentions, left out if the finding stays."""
    frame = replays.frame
    role, cpu, tgt = (frame[n].to_list() for n in ("role", "cpu", "tgt"))
    unit = list(zip(frame["dom"].to_list(), frame["vcpu"].to_list(), strict=True))
    matter = [i for i in rows if role[i] != "context"]
    cpus = {cpu[i] for i in matter} | {tgt[i] for i in matter} | {first["cpu"], first["tgt"], None}
    units = {unit[i] for i in matter} | {(first["dom"], first["vcpu"]), (None, None)}
    fewer = [i for i in rows if role[i] != "context" or (cpu[i] in cpus and unit[i] in units)]
    return fewer if len(fewer) < len(rows) and replays.holds(fewer) else rows


# -- the scenario and its test -------------------------------------------------------------------------------------


def _scenario(
    dataset: Dataset,
    chosen: Chosen,
    name: str,
    replays: _Replays,
    rows: Sequence[int],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The scenario's JSON object, checked by reading it back; `finding` is the place of ours among its divergences."""
    source = dataset.manifest["inputs"][0]
    first = chosen.first
    scenario: dict[str, Any] = {
        "id": _plain(name),
        "system": replays.system.name,
        "seed": None,
        "title": f"{first['code']}: {first['observed']}"[:200],
        "mode": "closed" if replays.closed else "open",
        "time_unit": dataset.manifest["clock"]["unit"],
        "config": dict(settings),
        "init": {},
        "events": [_event(row) for row in replays.frame[np.asarray(rows, dtype=np.int64)].iter_rows(named=True)],
        "end": replays.end,
        "policies": {},
        "explain": f"Shrunk from finding {chosen.id} of a recording. Expected: {first['expected']}.",
        "origin": {"source": source["source"], "sha256": source["sha256"]},
    }
    parsed = parse_scenario(json.loads(json.dumps(scenario)))
    run = run_scenario(parsed, replays.policy)
    places = [i for i, f in enumerate(run.findings) if _words_of(f) == replays.wanted]
    if not places:
        raise UsageError(f"{chosen.id}: written as a scenario it does not show itself any more; please report this")
    divergences = [_divergence(f) for f in run.findings]
    scenario["policies"] = {replays.policy: {"divergences": divergences, "metrics": {}}}
    return {**scenario, "finding": places[0]}


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    event = {"t": row["t_ns"], "kind": row["kind"], "role": row["role"]}
    event |= {k: row[k] for k in _OPTIONAL if row[k] is not None}
    if row["flags"]:
        event["flags"] = row["flags"]
    if row["conf"] != 100:
        event["conf"] = row["conf"]
    if row["t_err_ns"]:
        event["t_err"] = row["t_err_ns"]
    event["seq"] = row["seq"]
    if row["origin"] is not None:
        event["origin"] = dict(row["origin"])
    return event


def _divergence(finding: Finding) -> dict[str, Any]:
    fields = {k: getattr(finding, k) for k in _PLACE}
    given = {k: v for k, v in fields.items() if v not in (NONE, NIL)}
    return {"code": finding.code.name, "t": finding.t, "severity": finding.severity, **given}


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name.removesuffix(".json")) or "case"


_TEST: Final = '''\
# Shrunk from finding {finding} of {source}
# sha256 of the recording: {sha256}
"""A finding that must not come back. Fails until it is fixed; then the scenario guards the fix."""

from pathlib import Path

from replay.scenario import load_scenario, run_scenario

SCENARIO = Path(__file__).with_name({file})
POLICY = {policy}
#: Rule, severity and object of the finding.
SIGNATURE = {signature}
PLACE = [key for key in SIGNATURE if key != "code"]


def test_the_finding_is_gone() -> None:
    run = run_scenario(load_scenario(SCENARIO), POLICY)
    found = [f for f in run.findings if {{"code": f.code.name, **{{k: getattr(f, k) for k in PLACE}}}} == SIGNATURE]
    assert not found, f"at {{found[0].t}}: expected {{found[0].expected}}; observed {{found[0].observed}}"
'''


def write_case(case: Case, output: Path, *, force: bool = False) -> tuple[Path, Path]:
    """Write `NAME.json` and `test_NAME.py` beside it, each whole or not at all; returns their paths."""
    stem = _plain(output.name)
    scenario = output.parent / f"{stem}.json"
    test = output.parent / f"test_{stem.replace('-', '_')}.py"
    for path in (scenario, test):
        if path.exists() and not force:
            raise UsageError(f"{path} exists already: give --force to replace it, or another name")
    policy = next(iter(case.scenario["policies"]))
    signature = {k: v for k, v in case.signature.items() if k != "t"}
    # Names come from the recording: ascii() and clean() keep them inside their literal or their line.
    text = _TEST.format(
        finding=clean(case.finding), source=ascii(case.source), sha256=clean(str(case.scenario["origin"]["sha256"])),
        file=ascii(scenario.name), policy=ascii(policy), signature=ascii(signature),
    )  # fmt: skip
    contents = {scenario: json.dumps(case.scenario, indent=1) + "\n", test: text}
    with whole_files(*contents) as staged:
        for temporary, content in zip(staged, contents.values(), strict=True):
            temporary.write_text(content, encoding="utf-8")
    return scenario, test
