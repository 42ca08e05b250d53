"""However many findings there are, memory is bounded, every one is counted, and no verdict depends on the limit."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.declare import Code, Config
from replay.driver import Run, run_machine
from replay.events import KINDS
from replay.parting import part
from replay.sink import Finding, Sink
from replay.systems import SYSTEMS
from tests.cli.small import sample_dataset
from tracetool.replaying import Choice, Settings, replay_dataset
from tracetool.report import console, html, markdown, text
from tracetool.results import SEVERITIES

CODES = tuple(Code(f"code-{n}", "error", "", "", "", "") for n in range(2))
#: (code, severity, whether it is doubted later), or after how many ns lost records begin.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(CODES), st.sampled_from(SEVERITIES), st.booleans()),
        st.integers(0, 20),
    ),
    max_size=60,
)


def lowered(findings: Sequence[Finding]) -> None:
    """Those that were marked are one severity less, once."""
    for finding in findings:
        if finding.val == 1:
            finding.val = 0
            finding.severity = SEVERITIES[min(SEVERITIES.index(finding.severity) + 1, 2)]


def collected(steps: Sequence[Any], keep: int) -> Sink:
    sink = Sink(closed=False, keep=keep, doubt=lowered)
    for t, step in enumerate(steps):
        if isinstance(step, int):
            sink.taint(t - step)
        else:
            code, severity, doubted = step
            sink.report(code, t, severity=severity, val=int(doubted))
            assert len(sink.findings) <= 2 * keep * len(CODES) * len(SEVERITIES)
    sink.settle()
    return sink


@settings(deadline=None)
@given(STEPS, st.integers(1, 4))
def test_the_worst_is_kept_and_all_are_counted(steps: Sequence[Any], keep: int) -> None:
    few, every = collected(steps, keep), collected(steps, 1_000)
    assert not every.suppressed
    for code in CODES:
        kept = Counter(f.severity for f in few.findings if f.code is code)
        beyond = sum(n for (name, _), n in few.suppressed.items() if name == code.name)
        assert all(n <= keep for n in kept.values())
        assert sum(kept.values()) + beyond == sum(f.code is code for f in every.findings)
    for severity in SEVERITIES:  # from the worst on, as verdicts and exit codes are made
        assert any(f.severity == severity for f in few.findings) == any(f.severity == severity for f in every.findings)
        if any(f.severity == severity for f in every.findings):
            break


def moves(events: int, columns: Sequence[str]) -> Iterator[pa.Table]:
    """A channel's interrupt pointed to and fro: a remark for every event but the first."""
    step = 5_000
    kind = next(k.name for k in KINDS if k.name == "hpet.retarget")
    for start in range(0, events, step):
        t = np.arange(start, start + step, dtype=np.int64)
        zero = np.zeros(step, np.int64)
        made = {"t_ns": t, "seq": t, "cpu": zero, "obj": zero, "tgt": t % 2, "val": zero, "val2": zero, "flags": zero}
        table = {name: pa.array(made[name]) for name in {*columns, "t_ns"} - {"kind"}}
        yield pa.table({**table, "kind": pa.array([kind] * step).dictionary_encode()})


def replayed(events: int, keep: int) -> tuple[Run, int]:
    """The run, and the most memory that it took (bytes)."""
    system = SYSTEMS["hpet"]
    tracemalloc.start()
    run = run_machine(
        system, "current", lambda columns, _: moves(events, columns), config=Config(system.parameters), closed=False,
        keep=keep,
    )  # fmt: skip
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return run, peak


def test_memory_does_not_grow_with_findings() -> None:
    (short, least), (long, most) = replayed(5_000, 100), replayed(20_000, 100)
    assert (len(short.findings), short.suppressed) == (100, {("hpet-retarget", "info"): 4_899})
    assert (len(long.findings), long.suppressed) == (100, {("hpet-retarget", "info"): 19_899})
    assert long.findings == short.findings
    assert most < least + 200_000  # each of them takes 500 bytes
    assert long.metrics["hpet_retargets"] == 19_999


def test_outcomes_of_one_side_are_counted_too() -> None:
    recorded = pl.DataFrame({
        "seq": range(500), "t_ns": range(0, 500_000, 1_000), "t_err_ns": [0] * 500, "cpu": [0] * 500,
        "dom": [None] * 500, "vcpu": [None] * 500, "obj": [1] * 500, "tgt": [None] * 500, "val": [None] * 500,
    }, schema_overrides=dict.fromkeys(("dom", "vcpu", "tgt", "val"), pl.Int64))  # fmt: skip
    sink = Sink(closed=False, keep=7)
    effects = [(t, 1) for t in range(500, 500_000, 1_000)]
    found = part(
        effects, recorded, lambda e: e["obj"], str, match_ns=10, end_ns=1_000_000, reach_ns=0, sink=sink
    )
    assert Counter(f.code.name for f in found) == {"model-missing-outcome": 7, "model-extra-outcome": 7}
    assert sum(sink.suppressed.values()) == 500 - 7 + 499 - 7


def test_every_output_says_what_it_does_not_list(tmp_path: Path) -> None:
    dataset = sample_dataset(tmp_path / "d")
    (whole,) = replay_dataset(dataset, Settings((Choice("current"),), ("hpet",)))
    (cut,) = runs = replay_dataset(dataset, Settings((Choice("current"),), ("hpet",), keep=2))
    assert not whole["suppressed"] and not whole["suppressed_by_severity"]
    beyond = sum(cut["suppressed"].values())
    assert 0 < beyond == len(whole["findings"]) - len(cut["findings"]) == sum(cut["suppressed_by_severity"].values())
    listed = Counter(f["severity"] for f in cut["findings"]) + Counter(cut["suppressed_by_severity"])
    assert listed == Counter(f["severity"] for f in whole["findings"])
    assert (cut["verdict"], cut["metrics"], cut["seen"]) == (whole["verdict"], whole["metrics"], whole["seen"])
    said = f"{beyond:,} further findings".replace(",", " ")
    for page in (
        console.render(runs, dataset.manifest).plain, text.render(runs, dataset.manifest, 10_000),
        markdown.render(runs, dataset.manifest), html.render(dataset, runs), json.dumps(runs),
    ):  # fmt: skip
        assert said in page.replace("\u202f", " ") or '"suppressed": {"hpet-' in page
