"""Datasets and runs for the tests of reports, made from scenarios or by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parsers.recording import Gap, Note
from replay.coverage import Observation, coverage
from replay.declare import Config
from replay.driver import run_machine
from replay.events import KINDS, SCHEMA, events_from_json
from replay.scenario import load_scenario, run_scenario
from replay.systems import SYSTEMS
from tests.shared import SAMPLES
from tracetool.results import run_record
from tracetool.store import Dataset, DatasetWriter

__all__ = ["busy", "dataset", "handover", "hostile", "scattered", "verify", "what_if"]

#: Strings that a guest or a file name may carry.
HOSTILE = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "'; window.pwned=1; //",
    "</script><script>window.pwned=1</script>",
    "{{ 7*7 }} {% raw %}",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "abc\u202edcba\u2066x",
    "line\nbreak\r\ttab\x00nul",
    "[bold red]markup[/bold red] `code` | pipe *star* <b>",
    "# heading\n\n* list\n\n| a |\n|---|\n| [link](http://e.example/) ![image](x.png) |\n\n```\nfence",
    "fixes #1, GH-2, @someone, me@e.example, www.e.example https://e.example/x &lt;b&gt; ]]> <![CDATA[x",
    "\udcff\udcfe",
)


def dataset(
    path: Path,
    events: Sequence[Mapping[str, Any]],
    *,
    manifest: Mapping[str, Any] | None = None,
    gaps: Sequence[Gap] = (),
    notes: Sequence[Note] = (),
    origin: bool = True,
    source: str = "made.xentrace",
) -> Dataset:
    """A finished dataset of canonical events; `gaps` have their ends in ns."""
    given = [dict(e) for e in events]
    if origin:
        for index, event in enumerate(given):
            event.setdefault("origin", {"file": source, "offset": 0x40 + 24 * index, "raw_kind": event["kind"]})
    with DatasetWriter(path, force=True) as writer:
        for gap in gaps:
            writer.add_gap(gap, source, gap.t0, gap.t1)
        for note in notes:
            writer.add_note(note, source)
        writer.close_records()
        writer.write_events([events_from_json(given, src="made")], SCHEMA)
        writer.finish(manifest or {})
    return Dataset.open(path)


def verify(data: Dataset, system: str = "hpet", policy: str = "current", **values: Any) -> dict[str, Any]:
    """The record of a verify run over a dataset's events."""
    chosen = SYSTEMS[system]
    config = Config(chosen.parameters, values)
    kinds = set(data.events().select("kind").collect()["kind"].cast(str).to_list())
    seen = {k: Observation(100, "recorded") for k in kinds}
    rows = {r["seq"]: (r["origin"]["file"], r["origin"]["offset"]) for r in _origins(data)}
    batches = list(data.event_batches([k.name for k in KINDS], SCHEMA.names))
    run = run_machine(chosen, policy, batches, config=config, closed=False, observed=frozenset(kinds))
    return run_record(
        run, chosen, config, coverage(chosen, seen), locate=lambda s: {i: rows[i] for i in s if i in rows}
    )


def _origins(data: Dataset) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = data.events().select("seq", "origin").collect().to_dicts()
    return [r for r in rows if r["origin"]["offset"] is not None]


def what_if(scenario: str, policy: str) -> dict[str, Any]:
    """The record of a scenario under a policy."""
    loaded = load_scenario(SAMPLES / "scenarios" / f"{scenario}.json")
    config = Config(loaded.system.parameters, loaded.config)
    seen = {k: Observation(100, "given by the scenario") for k in loaded.system.kinds}
    return run_record(run_scenario(loaded, policy), loaded.system, config, coverage(loaded.system, seen))


MANIFEST: dict[str, Any] = {
    "inputs": [{"name": "made.xentrace", "format": "xentrace", "sha256": "ab" * 32, "bytes": 4096, "source": "made"}],
    "tool": "tracetool 0.1.0",
    "clock": {"kind": "tsc", "hz": 2596155000.0, "unit": "ns", "origin": "PM_IDLE ticks", "error_ppm": 12.5, "doc": ""},
    "span": {"t0_ns": 0, "t1_ns": 5_000_000},
    "cpus": [0, 1, 2, 3],
    "domains": [0, 1, 32767],
    "bytes": {"total": 4096, "parsed": 4000, "skipped": 96},
    "counts": {"PM_IDLE_ENTER": 120, "PM_IDLE_EXIT": 119, "TRC_LOST_RECORDS": 1},
    "observed": {"idle.enter": {"conf": 100, "how": "PM_IDLE_ENTRY"}, "idle.exit": {"conf": 80, "how": "PM_IDLE_EXIT"}},
    "facts": {"xen_version": "4.17"},
    "command": "tracetool ingest made.xentrace -o made",
}


def handover(path: Path) -> tuple[Dataset, list[dict[str, Any]]]:
    """The hand-over of document 000, with the interrupts and wake-ups that a recording of it would show."""
    us = 1000
    events = [
        {"t": 0, "kind": "idle.enter", "cpu": 0, "val": 1000 * us},
        {"t": 2 * us, "kind": "hpet.program", "cpu": 0, "obj": 0, "val": 998 * us},
        {"t": 100 * us, "kind": "idle.enter", "cpu": 1, "val": 800 * us},
        {"t": 101 * us, "kind": "hpet.retarget", "cpu": 1, "obj": 0, "tgt": 1, "val": 0},
        {"t": 300 * us, "kind": "idle.exit", "cpu": 0},
        {"t": 320 * us, "kind": "isr.begin", "cpu": 0, "obj": 0x59},
        {"t": 380 * us, "kind": "isr.end", "cpu": 0, "obj": 0x59},
        {"t": 400 * us, "kind": "idle.enter", "cpu": 0, "val": 2000 * us},
        {"t": 500 * us, "kind": "idle.exit", "cpu": 1},
        {"t": 501 * us, "kind": "hpet.retarget", "cpu": 1, "obj": 0, "tgt": 0, "val": 1, "flags": 1},
        {"t": 800 * us, "kind": "hpet.fire", "cpu": 1, "obj": 0},
        {"t": 801 * us, "kind": "hpet.handler.begin", "cpu": 1, "obj": 0},
        {"t": 804 * us, "kind": "wake.post", "cpu": 1, "tgt": 0, "flags": 2},
        {"t": 806 * us, "kind": "hpet.handler.end", "cpu": 1, "obj": 0},
        {"t": 830 * us, "kind": "idle.exit", "cpu": 0},
        {"t": 900 * us, "kind": "idle.enter", "cpu": 0, "val": 2000 * us},
        {"t": 2000 * us, "kind": "hpet.fire", "cpu": 1, "obj": 0},
        {"t": 2001 * us, "kind": "hpet.handler.begin", "cpu": 1, "obj": 0},
        {"t": 2006 * us, "kind": "hpet.handler.end", "cpu": 1, "obj": 0},
        {"t": 2900 * us, "kind": "idle.exit", "cpu": 0},
    ]
    gaps = [Gap("lost-records", 2, 3_200_000, 3_600_000, 0x800, 96, 17, "the reader was too slow")]
    notes = [Note("assumed-version", "info", "Xen 4.17 assumed from the width of PM_IDLE records", 0x40)]
    data = dataset(path, events, manifest=MANIFEST, gaps=gaps, notes=notes)
    # What is said about them is given, so that these tests hold the report and not the monitor.
    runs = [{**verify(data), "findings": _handover_findings(), "verdict": "findings"}]
    for policy in ("proposed", "proposed-keep", "upstream-2025"):
        run = what_if("s1-handover-wrong-cpu", policy)
        run["horizon_ns"] = 800 * us
        run["calibration"] = "calibrated: the recorded policy agrees with the recording"
        runs.append(run)
    return data, runs


def _handover_findings() -> list[dict[str, Any]]:
    base: dict[str, Any] = {
        "t_first_ns": None, "cpu": 1, "dom": None, "vcpu": None, "obj": 0, "tgt": None, "val": 0, "confidence": 100,
        "source": "made.xentrace", "rule": "A6", "caused_by": None, "tags": [],
    }  # fmt: skip
    pointed = {
        "t_ns": 101_000,
        "seq": 3,
        "label": "channel 0 pointed at cpu 1",
        "source": "made.xentrace",
        "offset": 0x88,
    }
    stale = {
        **base, "code": "hpet-affinity-stale", "severity": "warn", "t_ns": 501_000, "cpu": 0, "offset": 0x118,
        "expected": "message to cpu 0", "observed": "still to cpu 1", "episode": 1, "evidence": [pointed],
    }  # fmt: skip
    wrong = [
        {
            **base, "code": "hpet-wrong-cpu", "severity": "error", "t_ns": t, "offset": offset, "episode": 2,
            "expected": "interrupt on cpu 0", "observed": "handler on cpu 1",
            "evidence": [
                pointed,
                {"t_ns": t, "seq": seq, "label": "handler of channel 0 begins", "source": "made.xentrace",
                 "offset": offset},
            ],
        }
        for t, seq, offset in ((801_000, 11, 0x148), (2_001_000, 17, 0x1D8))
    ]  # fmt: skip
    missed = {
        **base, "code": "hpet-missed-wakeup", "severity": "warn", "t_ns": 2_900_000, "t_first_ns": 2_000_000, "cpu": 0,
        "obj": None, "offset": 0x208, "expected": "a wake at the deadline", "observed": "asleep 900000 ns longer",
        "confidence": 50, "episode": 3,
        "evidence": [{"t_ns": 2_000_000, "seq": None, "label": "its deadline", "source": None, "offset": None}],
    }  # fmt: skip
    return [stale, wrong[0], wrong[1], missed]


def busy(
    path: Path, *, cpus: int = 8, cycles: int = 4000, findings: int = 3000
) -> tuple[Dataset, list[dict[str, Any]]]:
    """A long recording: many idle periods and HPET interrupts, gaps, and findings scattered over it."""
    events: list[dict[str, Any]] = []
    for i in range(cycles):
        cpu = i % cpus
        t = i * 250_000 + (i * 7919) % 60_000
        length = 900_000 + (i * 104_729) % 700_000
        events += [
            {"t": t, "kind": "idle.enter", "cpu": cpu, "val": t + length},
            {"t": t + length, "kind": "hpet.fire", "cpu": cpu, "obj": cpu % 3},
            {"t": t + length + 500, "kind": "hpet.handler.begin", "cpu": cpu, "obj": cpu % 3},
            {"t": t + length + 9_500, "kind": "hpet.handler.end", "cpu": cpu, "obj": cpu % 3},
            {"t": t + length + 10_000, "kind": "idle.exit", "cpu": cpu},
            {"t": t + length + 20_000, "kind": "lapic.deliver", "dom": 1, "vcpu": cpu % 4, "obj": 0xF3},
            {"t": t + length + 42_000, "kind": "lapic.eoi", "dom": 1, "vcpu": cpu % 4, "obj": 0xF3},
        ]
    events.sort(key=lambda e: e["t"])
    end = events[-1]["t"]
    gaps = [
        Gap("lost-records", 1, end // 3, end // 3 + end // 20, 0x9000, 0, 1234),
        Gap("truncated", None, end * 19 // 20, None, 0xFFFF00, 512),
    ]
    data = dataset(path, events, manifest={**MANIFEST, "span": {"t0_ns": 0, "t1_ns": end}}, gaps=gaps)
    run = verify(data)
    run["findings"] = [scattered(i, end, cpus) for i in range(findings)]
    run["verdict"] = "findings"
    return data, [run]


def scattered(i: int, end: int, cpus: int) -> dict[str, Any]:
    code, severity = (("hpet-late-wakeup", "warn"), ("hpet-missed-wakeup", "error"), ("hpet-early-wakeup", "info"))[
        i % 3
    ]
    return {
        "code": code, "severity": severity, "t_ns": (i * 7_368_787) % end, "t_first_ns": None, "cpu": i % cpus,
        "dom": None, "vcpu": None, "obj": None, "tgt": None, "val": 1000 * i, "expected": "awake at its deadline",
        "observed": f"awake {i} us later", "confidence": 80, "source": "made.xentrace", "offset": 0x40 + 24 * i,
        "episode": i // 2 + 1, "rule": "A6", "caused_by": None, "tags": [], "evidence": [],
    }  # fmt: skip


def hostile(path: Path, strings: Sequence[str] = HOSTILE) -> tuple[Dataset, list[dict[str, Any]]]:
    """Every string that comes from outside is one of `strings`."""
    data, runs = handover(path)
    bad = list(strings)
    manifest = {
        **MANIFEST,
        "inputs": [{"name": b, "format": b, "sha256": b, "bytes": 1, "source": b} for b in bad],
        "tool": bad[0], "command": " ".join(bad), "counts": {b: i for i, b in enumerate(bad)},
        "observed": {b: {"conf": 50, "how": b} for b in bad}, "facts": {b: b for b in bad},
        "clock": {"kind": bad[0], "hz": None, "unit": "ns", "origin": bad[3], "error_ppm": None, "doc": bad[5]},
    }  # fmt: skip
    safe = [b.encode("utf-8", "replace").decode() for b in bad]
    gaps = [Gap(b, 0, 100_000 * i, 100_000 * i + 50_000, i, 1, 1, b) for i, b in enumerate(safe)]
    notes = [Note(b, "warn", b) for b in safe]
    events = [{"t": 100_000 * i, "kind": "idle.enter", "cpu": i % 2, "val": 0,
               "origin": {"file": b, "offset": i, "raw_kind": b}} for i, b in enumerate(safe)]  # fmt: skip
    data = dataset(path, events, manifest=manifest, gaps=gaps, notes=notes)
    run = runs[0]
    run["findings"] = [
        {**scattered(i, 900_000, 2), "expected": b, "observed": b, "source": b, "caused_by": b, "tags": [b],
         "evidence": [{"t_ns": 1, "seq": None, "label": b, "source": b, "offset": 1}], "episode": i + 1}
        for i, b in enumerate(bad)
    ]  # fmt: skip
    run["coverage"] = [{**c, "reason": bad[i % len(bad)]} for i, c in enumerate(run["coverage"])]
    run["extra"] = {b: [{b: b, "n": {b: [b]}}] for b in bad}
    run["metrics"] = dict.fromkeys(bad, 1)
    run["recorded"] = {"policy": bad[0], "why": bad[8]}
    other = {
        **runs[1], "policy": bad[8], "title": bad[0], "metrics": dict.fromkeys(bad, 2),
        "calibration": {"state": "uncalibrated", "reasons": bad, "metrics": dict.fromkeys(bad, (1, 2))},
        "findings": [{**f, "expected": b, "observed": b} for f, b in zip(run["findings"], bad, strict=True)],
    }  # fmt: skip
    return data, [run, other]
