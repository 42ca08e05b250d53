"""Several recordings as one: common clock, unique order, honest uncertainty, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.declare import UsageError
from replay.events import SCHEMA, events_from_json
from tests.shared import SAMPLES, shared_path
from tracetool import align, cli
from tracetool.ingest import Ingested, IngestOptions, ingest, parse_offset
from tracetool.replaying import Settings, choose, replay_dataset
from tracetool.report import console
from tracetool.store import Dataset
from tracetool.streams import merged

XEN_2L = ("xen-2l/dom0-light.xentrace.zst", "xen-2l/dom0-light.dat.zst")
INTX = ("xen-hvm-intx/boot.xentrace.zst", "xen-hvm-intx/guest.trace.txt.zst")


def put(folder: Path, names: tuple[str, ...], **options: Any) -> Ingested:
    """Ingest shared recordings together."""
    return ingest([str(shared_path(f"recordings/{n}")) for n in names], folder, IngestOptions(**options))


@pytest.fixture(scope="module")
def same_tsc(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(put(tmp_path_factory.mktemp("merge") / "d", XEN_2L).path)


@pytest.fixture(scope="module")
def estimated(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(put(tmp_path_factory.mktemp("merge") / "d", INTX).path)


def input_of(dataset: Dataset, number: int) -> dict[str, Any]:
    found: dict[str, Any] = dataset.manifest["inputs"][number]
    return found


def test_one_tsc_gives_one_clock(same_tsc: Dataset) -> None:
    """The stamps of both are ticks of one counter: t_ns is a function of tsc alone, up to 1 ns of rounding."""
    host, guest = input_of(same_tsc, 0), input_of(same_tsc, 1)
    assert (host["clock"]["kind"], guest["clock"]["kind"]) == ("reference", "same-tsc")
    assert guest["domain"] == 0
    assert (guest["clock"]["offset_ticks"], guest["clock"]["uncertainty_ns"]) == (0, 0)
    origins = []
    for name in ("TRC_SCHED_SWITCH", "TRC_PM_IDLE_EXIT", "irq_handler_entry", "sched_switch"):
        frame = same_tsc.scan(name).filter(pl.col("tsc").is_not_null()).select("t_ns", "tsc").collect()
        ticks = frame["tsc"].to_numpy().astype(np.float64) - 291073191966
        origins.append(frame["t_ns"].to_numpy() - ticks * 1e9 / same_tsc.manifest["clock"]["hz"])
    spread = np.concatenate(origins)
    assert spread.max() - spread.min() < 3
    assert same_tsc.manifest["span"]["t0_ns"] == 0


def test_nothing_is_lost_and_seq_is_unique(same_tsc: Dataset) -> None:
    rows = sum(t["rows"] for t in same_tsc.manifest["tables"].values())
    assert rows == same_tsc.manifest["span"]["records"] == sum(i["records"] for i in same_tsc.manifest["inputs"])
    seqs = pl.concat(
        [same_tsc.scan(n).select("seq", source=pl.col("source").cast(pl.String)) for n in same_tsc.tables()]
    ).collect()
    assert seqs["seq"].n_unique() == seqs.height == rows
    by_source = dict(seqs.group_by("source").len().iter_rows())
    assert by_source == {i["source"]: i["records"] for i in same_tsc.manifest["inputs"]}
    for source in same_tsc.manifest["inputs"]:
        lo, hi = source["seq"]
        inside = seqs.filter(pl.col("source") == source["source"])["seq"]
        assert (int(inside.min()), int(inside.max()) + 1) == (lo, hi)  # type: ignore[arg-type]


def test_the_guest_runs_while_it_writes(same_tsc: Dataset, estimated: Dataset) -> None:
    """Independent of the alignment: between run and stop of its vCPU, and nowhere else."""
    for dataset, dom, table in ((same_tsc, 0, "cpu_idle"), (estimated, 1, "sched_switch")):
        runs = (
            dataset.scan("TRC_SCHED_RUNSTATE_CHANGE")
            .filter((pl.col("dom") == dom) & ((pl.col("old_state") == 0) | (pl.col("new_state") == 0)))
            .select("t_ns", cpu="vcpu", runs=pl.col("new_state") == 0)
            .collect()
            .sort("t_ns", maintain_order=True)
        )
        guest = dataset.scan(table).select("t_ns", "t_err_ns", "cpu").collect().sort("t_ns")
        guest = guest.filter(pl.col("t_ns") < runs["t_ns"].max())
        found = guest.with_columns(pl.col("cpu")).join_asof(
            runs, on="t_ns", by="cpu", strategy="backward", check_sortedness=False
        )
        assert found.height > 500
        assert found["runs"].mean() > 0.97  # type: ignore[operator]


def test_estimated_offset(estimated: Dataset) -> None:
    """About 95,888 million ticks were found by hand, with a median distance of 57 us."""
    clock = input_of(estimated, 1)["clock"]
    assert clock["kind"] == "estimated"
    assert abs(clock["offset_ticks"] - 95_888_000_000) < 1_000_000
    assert 0 < clock["uncertainty_ns"] < 150_000
    assert input_of(estimated, 1)["domain"] == 1
    shifted = estimated.scan("irq_handler_entry").select(pl.col("t_err_ns").min()).collect().item()
    assert shifted == clock["uncertainty_ns"]
    host = estimated.scan("TRC_SCHED_SWITCH").select(pl.col("t_err_ns").min()).collect().item()
    assert host == 0


def test_estimate_bounds_hold_on_all_pairs(estimated: Dataset) -> None:
    """Every injection of the overlap comes before a handler of its own, none before it was injected."""
    entries = estimated.scan("irq_handler_entry").filter(pl.col("irq") == 24).select("t_ns").collect().sort("t_ns")
    injected = estimated.scan("TRC_HVM_INJ_VIRQ").filter(pl.col("vector") == 0x21).select("t_ns").collect()
    last = estimated.scan("TRC_SCHED_SWITCH").select(pl.col("t_ns").max()).collect().item()
    inside = entries.filter(pl.col("t_ns") < last)
    joined = inside.with_columns(handler=pl.col("t_ns")).join_asof(
        injected.sort("t_ns").with_columns(injected=pl.col("t_ns")), on="t_ns", strategy="backward"
    )
    assert joined.height > 250
    assert joined["injected"].n_unique() >= 0.99 * joined.height
    delay = (joined["handler"] - joined["injected"]).to_numpy()
    assert np.median(delay) < 250_000
    assert (delay > 5_000_000).mean() < 0.01


def test_a_stated_offset_replaces_the_estimate(tmp_path: Path, estimated: Dataset) -> None:
    ticks = input_of(estimated, 1)["clock"]["offset_ticks"]
    offset = parse_offset(f"guest.trace.txt.zst={ticks}")
    stated = Dataset.open(put(tmp_path / "d", INTX, offsets=(offset,)).path)
    clock = input_of(stated, 1)["clock"]
    assert (clock["kind"], clock["offset_ticks"], clock["uncertainty_ns"]) == ("stated", ticks, 0)
    assert abs(clock["shift_ns"] - input_of(estimated, 1)["clock"]["shift_ns"]) <= 1
    assert input_of(stated, 1)["domain"] == 1


def test_a_wrong_statement_is_said(tmp_path: Path) -> None:
    done = put(tmp_path / "d", XEN_2L, offsets=(parse_offset("dom0-light.dat.zst=+3ms"),))
    assert [n["code"] for n in done.notes if n["code"] == "offset-contradicted"]
    assert done.manifest["inputs"][1]["domain"] is None


def test_a_snapshot_without_stamps_needs_no_frequency(tmp_path: Path) -> None:
    """Ticks stay ticks, and what the recording shows is as if it were alone; with stamps there is no common unit."""
    recording, snapshot = SAMPLES / "ftrace-linux-6.1_50-clock-x86-tsc.txt.zst", SAMPLES / "proc-interrupts-dom0.txt"
    alone = ingest([str(recording)], tmp_path / "alone", IngestOptions()).manifest
    both = ingest([str(recording), str(snapshot)], tmp_path / "both", IngestOptions())
    merged_ = both.manifest
    assert {p.name for p in both.path.iterdir()} == {p.name for p in (tmp_path / "alone").iterdir()}
    assert merged_["clock"]["unit"] == alone["clock"]["unit"] == "ticks" and merged_["clock"]["hz"] is None
    assert merged_["events"] == alone["events"] and merged_["observed"] == alone["observed"]
    assert merged_["inputs"][0]["records"] == alone["span"]["records"]
    assert merged_["inputs"][1]["records"] == 131 and merged_["inputs"][1]["clock"]["kind"] == "snapshot"
    assert merged_["inputs"][1]["span"]["t0_ns"] > merged_["inputs"][0]["span"]["t1_ns"]
    stamped = tmp_path / "timer_list"
    stamped.write_text("Timer List Version: v0.9\nHRTIMER_MAX_CLOCK_BASES: 8\nnow at 5000000000 nsecs\n\ncpu: 0\n")
    with pytest.raises(UsageError, match="no frequency is known"):
        ingest([str(recording), str(stamped)], tmp_path / "c", IngestOptions())


def test_a_recording_tells_its_frequency_beside_a_snapshot_too(tmp_path: Path) -> None:
    """What the timers of a recording tell when it is alone, they tell beside a snapshot."""
    folder = "linux-6.1-hpet-msi"
    alone = put(tmp_path / "alone", (f"{folder}/plain-load.dat.zst",)).manifest
    both = put(tmp_path / "both", (f"{folder}/plain-load.dat.zst", f"{folder}/interrupts-end.txt"))
    assert {k: v for k, v in both.manifest["clock"].items() if k != "offsets"} == alone["clock"]
    assert both.manifest["inputs"][0]["span"] == {k: alone["span"][k] for k in ("t0_ns", "t1_ns")}
    assert both.manifest["events"] == alone["events"]
    assert [note["code"] for note in both.notes].count("clock-derived") == 1


def test_unmergeable_is_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest's recording with another run of the hypervisor: one line, exit 2, nothing left."""
    names = [str(shared_path(f"recordings/{n}")) for n in ("xen-2l/idle-cx.xentrace", "xen-2l/dom0-light.dat.zst")]
    code = cli.run(["ingest", *names, "-o", str(tmp_path / "d")])
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "dom0-light.dat.zst cannot be put on the clock of idle-cx.xentrace" in error
    assert "do not overlap" in error and "--offset" in error
    assert list(tmp_path.iterdir()) == []


def test_wrong_partner_is_not_matched(tmp_path: Path) -> None:
    """The guest of another host: its interrupts have no pattern in common with these injections."""
    with pytest.raises(UsageError, match="cannot be put on the clock"):
        put(tmp_path / "d", ("xen-hvm-intx/load.xentrace.zst", "xen-hvm-intx/guest.trace.txt.zst"))


def test_events_of_both_are_in_one_order(same_tsc: Dataset) -> None:
    events = same_tsc.events().select("seq", "t_ns", "src_seq", pl.col("src").cast(pl.String)).collect()
    assert events["seq"].to_list() == list(range(events.height))
    assert events["t_ns"].is_sorted()
    for source in same_tsc.manifest["inputs"]:
        lo, hi = source["seq"]
        mine = events.filter(pl.col("src") == source["source"])["src_seq"]
        assert mine.is_between(lo, hi, closed="left").all()


@pytest.mark.parametrize("text", ["", "x", "x=", "=5", "x=1.5", "x=nans", "x=1e400s", "x=9999999999999999999999"])
def test_bad_offsets(text: str) -> None:
    with pytest.raises(UsageError):
        parse_offset(text)


def test_good_offsets() -> None:
    assert parse_offset("a=b=-5").amount == -5
    assert parse_offset("a=b=-5").label == "a=b"
    assert not parse_offset("g=+12.5ms").ticks
    assert parse_offset("g=+12.5ms").amount == 12_500_000


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=12), min_size=1, max_size=3))
def test_merging_streams_is_a_stable_sort(streams: list[list[tuple[int, bool]]]) -> None:
    """Any division into batches, any ties: the result is the stable sort by (time, stream)."""
    expected = []
    given_streams = []
    for number, steps in enumerate(streams):
        t, batches, batch = 0, [], []
        for index, (step, cut) in enumerate(steps):
            t += step
            batch.append({"t": t, "kind": "sched.run", "cpu": number, "dom": 1, "vcpu": 0, "seq": index})
            expected.append((t, number, index))
            if cut:
                batches.append(events_from_json(batch, src=f"s{number}"))
                batch = []
        if batch:
            batches.append(events_from_json(batch, src=f"s{number}"))
        given_streams.append(iter(batches))
    tables = list(merged(given_streams))
    table = pa.concat_tables(tables).unify_dictionaries() if tables else SCHEMA.empty_table()
    got = list(zip(*(table[n].to_pylist() for n in ("t_ns", "cpu", "src_seq")), strict=True))
    assert got == sorted(expected)
    assert table["seq"].to_pylist() == list(range(table.num_rows))
    assert table["src"].to_pylist() == [f"s{n}" for _, n, _ in sorted(expected)]


def test_estimate_refuses_noise() -> None:
    """Two trains of events that have nothing in common."""
    rng = np.random.default_rng(7)
    one, other = (np.sort(rng.integers(0, 10**10, 600)) for _ in range(2))
    assert align._coarse(one, other)[0] < align.MIN_SCORE
    delayed = one[100:500] + 41_000 + rng.integers(0, 30_000, 400) - 7 * 10**9
    score, lag = align._coarse(one, np.sort(delayed))
    assert score > align.MIN_SCORE
    assert abs(lag + 7 * 10**9) < 2 * align.BIN_NS


def test_json_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(shared_path(f"recordings/{n}")) for n in XEN_2L]
    assert cli.run(["ingest", *names, "-o", str(tmp_path / "d"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["clock"]["offsets"]["dom0-light.dat.zst"]["kind"] == "same-tsc"


def test_a_healthy_callback_raises_nothing_and_the_2008_code_would_have(estimated: Dataset) -> None:
    """Document 001 alive: the recorded run is clean; routed to vCPU 1, the code of 2008 injects in vain."""
    facts = estimated.manifest["facts"]["callback_config"]
    assert facts == {"gsi": 24, "vector": 0x21, "gsi_shared": 0, "rte_dest_vcpu": 0}
    recorded = replay_dataset(estimated, Settings(systems=("callback",)))[0]
    assert [f for f in recorded["findings"] if f["severity"] != "info"] == []
    counted = estimated.scan("TRC_HVM_INJ_VIRQ").filter(pl.col("vector") == 0x21).select(pl.len()).collect().item()
    assert recorded["metrics"]["injections"] == counted == 807
    assert recorded["metrics"]["callback_eois"] == 807
    assert recorded["metrics"]["handlers"] == 661
    assert "spurious_injections" not in recorded["metrics"] or recorded["metrics"]["spurious_injections"] == 0
    text = " ".join(console.render([recorded], estimated.manifest).plain.split())
    assert "none: spurious_injections, storm_max, unmatched_injections, repeated_injections" in text
    runs = {}
    for policy in ("current", "proposed", "applied"):
        settings_ = Settings((choose(f"callback={policy}"),), ("callback",), {"callback": {"rte_dest_vcpu": 1}})
        runs[policy] = replay_dataset(estimated, settings_)[0]["metrics"]
    assert runs["current"]["spurious_injections"] > 100 * max(1, runs["proposed"]["spurious_injections"])
    assert runs["current"]["useful_injections"] > 500


def test_each_injection_has_its_handler_its_upcall_and_its_eoi(estimated: Dataset) -> None:
    """Against the record tables: who follows whom in time, and what was between an EOI and the next injection."""
    metrics = replay_dataset(estimated, Settings(systems=("callback",)))[0]["metrics"]
    keep = ("seq", "t_ns", "cpu")
    injected = estimated.scan("TRC_HVM_INJ_VIRQ").filter(pl.col("vector") == 0x21).select(keep).collect()
    entries = estimated.scan("irq_handler_entry").select(*keep, "irq").collect().sort("t_ns")
    handlers = entries.filter((pl.col("irq") == 24) & (pl.col("t_ns") < int(injected["t_ns"].max()) + 1_000_000))
    pairs = handlers.join_asof(
        injected.sort("t_ns").select("t_ns", injection=pl.col("seq")), on="t_ns", strategy="backward"
    )
    assert pairs["injection"].n_unique() == pairs.height == metrics["matched_handler"] == 539
    first = int(pairs["injection"].min())
    assert injected.filter(pl.col("seq") >= first).height == 539
    assert metrics["unmatched_injections"] == metrics["unmatched_handlers"] == 0
    # An upcall is a loop's turn between a handler and the next one; the probe came a little later than the handlers.
    turns = estimated.scan("h2l").select("t_ns", turn=pl.col("seq")).collect().sort("t_ns")
    ends = estimated.scan("irq_handler_exit").filter(pl.col("irq") == 24).select("t_ns", end=pl.col("t_ns")).collect()
    inside = handlers.join_asof(ends.sort("t_ns"), on="t_ns", strategy="forward").join_asof(
        turns.with_columns(at=pl.col("t_ns")), on="t_ns", strategy="forward"
    )
    assert inside.filter(pl.col("at") < pl.col("end")).height == metrics["matched_upcall"] == 528
    assert metrics["matched_all"] == 528 and metrics["matched_eoi"] == metrics["injections"] == 807
    # Repeated: injected at the exit of the EOI itself, with no VM entry between. Every handler found work.
    steps = [
        estimated.scan(name).filter(chosen).select("cpu", "seq", what=pl.lit(what)).collect()
        for name, what, chosen in (
            ("TRC_HVM_INJ_VIRQ", "inject", pl.col("vector") == 0x21),
            ("TRC_HVM_MSR_WRITE", "eoi", pl.col("msr") == 0x80B),
            ("TRC_HVM_VMENTRY", "entry", pl.lit(True)),
        )
    ]
    order = pl.concat(steps).sort("cpu", "seq").with_columns(before=pl.col("what").shift(1).over("cpu"))
    at_once = order.filter((pl.col("what") == "inject") & (pl.col("before") == "eoi")).height
    assert metrics["repeated_injections"] == at_once == 0
    nested = entries.filter(pl.col("irq") != 24).select("t_ns", work=pl.col("t_ns"))
    idle = inside.join_asof(nested, on="t_ns", strategy="forward").filter(pl.col("work") > pl.col("end")).height
    assert metrics["handlers_without_work"] == idle == 0


def test_the_handler_follows_its_injection(estimated: Dataset) -> None:
    """In the canonical order too, for all but the handlers of which the injection was not recorded."""
    events = (
        estimated.events()
        .with_columns(pl.col("kind").cast(pl.String))
        .filter(pl.col("kind").is_in(["via.inject", "via.eoi", "via.isr_begin", "via.isr_end"]) & (pl.col("vcpu") == 0))
        .select("seq", "kind", "obj", "t_ns")
        .collect()
    )
    rows = [r for r in events.iter_rows() if r[1] != "via.inject" or r[2] == 0x21]
    begun = [i for i, r in enumerate(rows) if r[1] == "via.isr_begin"]
    last = max(r[3] for r in rows if r[1] == "via.inject")
    inside = [i for i in begun if rows[i][3] < last]
    assert len(inside) > 250
    assert sum(rows[i - 1][1] == "via.inject" for i in inside) >= 0.98 * len(inside)


def test_without_the_guest_no_vector_is_guessed(tmp_path: Path) -> None:
    alone = Dataset.open(put(tmp_path / "d", INTX[:1]).path)
    assert "callback_config" not in alone.manifest["facts"]
    assert "--set callback.vector" in alone.manifest["facts"]["callback"]
    run = replay_dataset(alone, Settings(systems=("callback",)))[0]
    assert run["metrics"]["injections"] == 0
    told = replay_dataset(alone, Settings(systems=("callback",), values={"callback": {"vector": 0x21}}))[0]
    assert told["metrics"]["injections"] == 807
