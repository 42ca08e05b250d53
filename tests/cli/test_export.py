"""`tracetool export --perfetto`, read back as protobuf and held against the dataset.

The viewer's own trace_processor is a separate binary and not at hand here; what it insists on is checked instead:
every track described before use, begins and ends that pair on each track in time order, flows that join moments.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from replay.declare import UsageError
from tests.cli.small import ESCAPES, hostile_dataset, sample_dataset
from tests.cli.test_commands import tracetool
from tracetool.export import perfetto
from tracetool.replaying import Settings, choose, replay_dataset
from tracetool.store import Dataset

BEGIN, END, INSTANT = 1, 2, 3


@pytest.fixture(scope="module")
def protos() -> Any:
    return pytest.importorskip(
        "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="needs the extra: tracetool[perfetto]"
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return sample_dataset(tmp_path_factory.mktemp("export") / "d")


@pytest.fixture(scope="module")
def runs(dataset: Dataset) -> list[dict[str, Any]]:
    return replay_dataset(dataset, Settings(policies=(choose("current"), choose("proposed"))))


class Trace:
    """A trace file, read back and checked for what every trace must keep."""

    def __init__(self, protos: Any, path: Path) -> None:
        packets = protos.Trace.FromString(path.read_bytes()).packet
        self.names: dict[int, tuple[str, ...]] = {}
        events: list[tuple[int, Any]] = []
        for packet in packets:
            assert packet.trusted_packet_sequence_id == 1
            # One clock, nothing interned, no defaults: what the loader counts as an error when it is wrong is not used.
            used = {field.name for field, _ in packet.ListFields()}
            assert used <= {"trusted_packet_sequence_id", "sequence_flags", "timestamp", "track_descriptor",
                            "track_event"}, used  # fmt: skip
            assert len(used & {"track_descriptor", "track_event"}) == 1
            assert packet.sequence_flags == (1 if packet is packets[0] else 0)
            if packet.HasField("track_descriptor"):
                track = packet.track_descriptor
                assert track.uuid and track.uuid not in self.names and not packet.HasField("timestamp")
                assert track.name and track.name.isprintable()
                # A parent is described before its child.
                above = self.names[track.parent_uuid] if track.HasField("parent_uuid") else ()
                self.names[track.uuid] = (*above, track.name)
            else:
                assert packet.track_event.track_uuid in self.names
                assert packet.HasField("timestamp") and packet.timestamp < 1 << 63
                event = packet.track_event
                assert bool(event.name) == (event.type != END) and event.name.isprintable()
                for annotation in event.debug_annotations:
                    assert annotation.name and annotation.WhichOneof("value")
                    assert annotation.string_value.isprintable()
                events.append((packet.timestamp, packet.track_event))
        assert packets
        self.events = sorted(events, key=lambda e: e[0])  # stable, as the viewer sorts
        self.slices: dict[tuple[str, ...], list[tuple[int, int, str]]] = defaultdict(list)
        self.instants: dict[tuple[str, ...], list[tuple[int, Any]]] = defaultdict(list)
        opened: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for t, event in self.events:
            path_ = self.names[event.track_uuid]
            if event.type == BEGIN:
                assert not opened[event.track_uuid], f"slices of one lane overlap: {path_} at {t}"
                opened[event.track_uuid].append((t, event.name))
            elif event.type == END:
                start, name = opened[event.track_uuid].pop()
                self.slices[path_].append((start, t, name))
            else:
                assert event.type == INSTANT
                self.instants[path_].append((t, event))
        assert not any(opened.values())
        self.flows: dict[int, list[tuple[int, bool]]] = defaultdict(list)
        for t, event in self.events:
            ends = set(event.terminating_flow_ids)
            assert 0 not in ends and not ends & set(event.flow_ids)
            for flow in (*event.flow_ids, *ends):
                assert not any(ended for _, ended in self.flows[flow]), f"flow {flow} goes on after its end"
                self.flows[flow].append((t, flow in ends))
        for flow, steps in self.flows.items():
            assert len(steps) > 1 and steps[-1][1], f"flow {flow} has no end"


def exported(protos: Any, dataset: Dataset, runs: Any, path: Path, **window: float) -> tuple[Trace, dict[str, int]]:
    done = perfetto.export(dataset, runs, path, **window)
    assert done["bytes"] == path.stat().st_size
    return Trace(protos, path), done


def pairs(dataset: Dataset, begin: str, end: str, cpu: int) -> list[tuple[int, int]]:
    """(begin, end) on a CPU from the events, computed another way: consecutive rows of the two kinds."""
    kind = pl.col("kind").cast(pl.String)
    frame = dataset.events().filter(kind.is_in([begin, end]), pl.col("cpu") == cpu).sort("seq")
    frame = frame.with_columns(kind.alias("k")).with_columns(
        pl.col("k").shift(-1).alias("k1"), pl.col("t_ns").shift(-1).alias("t1")
    )
    rows = frame.filter((pl.col("k") == begin) & (pl.col("k1") == end)).select("t_ns", "t1").collect().rows()
    return [(a, b) for a, b in rows]


def test_slices_are_those_of_the_recording(protos: Any, dataset: Dataset, runs: Any, tmp_path: Path) -> None:
    trace, done = exported(protos, dataset, runs, tmp_path / "t.pftrace")
    total = 0
    for cpu in dataset.manifest["cpus"]:
        name = f"CPU {cpu}"
        idle = [(a, b) for a, b, _ in trace.slices["CPUs", name, "idle"]]
        want = pairs(dataset, "idle.enter", "idle.exit", cpu)
        # The last idle period has no exit in the recording: it reaches to the end.
        assert idle[: len(want)] == want
        assert len(idle) - len(want) <= 1
        total += len(want)
        handlers = [(a, b) for a, b, _ in trace.slices["CPUs", name, "handlers"]]
        assert handlers == pairs(dataset, "hpet.handler.begin", "hpet.handler.end", cpu)
    assert total > 300
    assert done["slices"] == sum(map(len, trace.slices.values()))
    channels = {p for p in trace.slices if p[0] == "Interrupts"}
    assert channels == {("Interrupts", f"HPET channel {c}", "handler") for c in (0, 1, 2)}
    assert sum(len(trace.slices[c]) for c in channels) == 220
    assert {p[1] for p in trace.slices if p[0] == "vCPUs"} == {"d0v0", "d0v1", "d0v2", "d0v3"}


def test_findings_are_joined_to_their_evidence(protos: Any, dataset: Dataset, runs: Any, tmp_path: Path) -> None:
    trace, done = exported(protos, dataset, runs, tmp_path / "t.pftrace")
    findings = {p[1]: v for p, v in trace.instants.items() if p[0] == "Findings"}
    for run in runs:
        shown = findings[f"{run['system']} under {run['policy']} ({run['mode']})"]
        moments = sorted((t, e.name) for t, e in shown if not e.name.endswith("(computed)"))
        assert moments == sorted((f["t_ns"], f"{f['severity']}: {f['code']}") for f in run["findings"])
    assert done["findings"] == sum(len(r["findings"]) for r in runs)
    flows: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for t, event in trace.events:
        for flow in (*event.flow_ids, *event.terminating_flow_ids):
            flows[flow].append((t, event.name))
    wrong = next(f for r in runs for f in r["findings"] if f["code"] == "hpet-wrong-cpu")
    steps = [s for s in flows.values() if s[-1] == (wrong["t_ns"], "warn: hpet-wrong-cpu")]
    assert [s[:-1] for s in steps] == [[(e["t_ns"], e["label"]) for e in wrong["evidence"]]]
    assert all(len(s) >= 2 for s in flows.values())
    assert len(flows) == sum(bool(f["evidence"]) for r in runs for f in r["findings"])


def test_a_window_is_a_part_of_the_whole(protos: Any, dataset: Dataset, runs: Any, tmp_path: Path) -> None:
    whole, _ = exported(protos, dataset, runs, tmp_path / "t.pftrace")
    part, _ = exported(protos, dataset, runs, tmp_path / "p.pftrace", start_s=1.0, end_s=2.0)
    low, high = 10**9, 2 * 10**9
    assert all(low <= t <= high for t, _ in part.events)
    for path, slices in whole.slices.items():
        want = [(max(a, low), min(b, high), n) for a, b, n in slices if b >= low and a <= high]
        assert part.slices.get(path, []) == want, path
    with pytest.raises(UsageError, match="--from"):
        perfetto.export(dataset, runs, tmp_path / "x", start_s=2, end_s=1)
    assert not (tmp_path / "x").exists()


def test_two_exports_are_byte_identical(protos: Any, dataset: Dataset, runs: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        perfetto.export(dataset, runs, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_gaps_and_hostile_names(protos: Any, tmp_path: Path) -> None:
    trace, done = exported(protos, hostile_dataset(tmp_path / "h"), [], tmp_path / "t.pftrace")
    (gap,) = trace.slices["Gaps", "all CPUs"]
    assert gap[:2] == (100, 1_000_000)  # its end is not known: to the end of the recording
    assert done["gaps_without_time"] == 1
    text = {e.name for _, e in trace.events} | {a.string_value for _, e in trace.events for a in e.debug_annotations}
    text |= {part for path in trace.names.values() for part in path}
    assert any("gap" in t for t in text)
    assert not set("".join(text)) & set(ESCAPES) - set(map(chr, range(32, 127)))


def test_lost_records_end_what_was_open(protos: Any, tmp_path: Path) -> None:
    import pyarrow as pa

    from replay.events import SCHEMA, events_from_json
    from tracetool.store import DatasetWriter

    events = [
        {"t": 0, "kind": "idle.enter", "cpu": 0},
        {"t": 10, "kind": "idle.enter", "cpu": 1},
        {"t": 20, "kind": "hpet.handler.begin", "cpu": 2, "obj": 0},
        {"t": 30, "kind": "hpet.handler.begin", "cpu": 2, "obj": 1},
        {"t": 40, "kind": "hpet.handler.end", "cpu": 2, "obj": 0},  # they overlap without nesting
        {"t": 50, "kind": "hpet.handler.end", "cpu": 2, "obj": 1},
        {"t": 500, "kind": "trace.lost", "cpu": 0, "val": 100},
        {"t": 600, "kind": "idle.exit", "cpu": 0},
        {"t": 700, "kind": "idle.exit", "cpu": 1},
    ]
    with DatasetWriter(tmp_path / "d") as writer:
        writer.append("t", pa.table({"a": [1]}))
        writer.close_records()
        origin = {"file": "f", "offset": 1, "raw_kind": "r"}
        writer.write_events([events_from_json({**e, "origin": origin} for e in events)], SCHEMA)
        writer.finish({"inputs": [{"source": "s", "sha256": ""}], "clock": {"unit": "ticks"},
                       "span": {"t0_ns": 0, "t1_ns": 1000, "records": 1}})  # fmt: skip
    trace, _ = exported(protos, Dataset.open(tmp_path / "d"), [], tmp_path / "t.pftrace")
    assert trace.slices["CPUs", "CPU 0", "idle"] == [(0, 100, "idle")]
    assert trace.slices["CPUs", "CPU 1", "idle"] == [(10, 700, "idle")]
    assert [(t, e.name) for t, e in trace.instants["CPUs", "CPU 0", "idle"]] == [(600, "idle.exit, begin not recorded")]
    handlers = trace.slices["CPUs", "CPU 2", "handlers"]
    assert sorted(handlers) == [(20, 40, "HPET channel 0"), (30, 50, "HPET channel 1")]
    assert "1 tick" in trace.instants[("Recording",)][0][1].name


def test_the_command(protos: Any, dataset: Dataset, tmp_path: Path) -> None:
    done = tracetool("export", dataset.path, "--perfetto", "-o", "t.pftrace", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    Trace(protos, tmp_path / "t.pftrace")
    done = tracetool("export", dataset.path, "--perfetto", "-o", "no/folder/t.pftrace", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "perfetto.protos.perfetto.trace.perfetto_trace_pb2", None)
    with pytest.raises(UsageError, match=r"pip install 'tracetool\[perfetto\]'"):
        perfetto.require()
