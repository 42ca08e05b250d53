"""The joint run: from the hypervisor's timer to dom0's handler on one clock."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from replay.budget import KINDS, PARTS, budget, budget_text, wakes
from tests.shared import shared_path
from tracetool import cli
from tracetool.ingest import IngestOptions, ingest
from tracetool.store import Dataset

MOMENTS = ["start", *(moment for _, moment in PARTS)]


def frame(*rows: tuple[str, int, int, int | None, int | None, int | None, int | None, int | None]) -> pl.DataFrame:
    names = ("kind", "t_ns", "cpu", "dom", "vcpu", "obj", "tgt", "val")
    return pl.DataFrame(rows, schema={n: pl.String if n == "kind" else pl.Int64 for n in names}, orient="row")


ONE_WAKE = (
    ("idle.enter", 1_000, 2, None, None, None, None, 5_000),
    ("hpet.handler.begin", 5_100, 2, None, None, 1, None, None),
    ("hpet.handler.end", 5_400, 2, None, None, 1, None, None),
    ("idle.exit", 5_500, 2, None, None, 1, 1, None),
    ("sched.run", 6_000, 2, 0, 3, None, None, None),
    ("evtchn.upcall", 6_200, 3, 0, 3, None, None, None),
    ("irqdesc.entry", 7_000, 3, 0, None, 40, None, None),
    ("sched.stop", 9_000, 2, 0, 3, None, None, None),
)


def test_one_wake() -> None:
    result = budget(wakes(frame(*ONE_WAKE)))
    assert [p["ns"] for p in result["parts"]] == [100, 300, 100, 500, 200, 800]
    assert result["total_ns"] == 2_000


@pytest.mark.parametrize("missing", range(7))
def test_a_wake_without_one_of_its_moments_is_not_counted(missing: int) -> None:
    rows = [row for index, row in enumerate(ONE_WAKE) if index != missing]
    assert budget(wakes(frame(*rows)))["wakes"] == 0


def test_what_follows_the_stop_has_another_cause() -> None:
    late = [(k, t + 5_000 if k == "evtchn.upcall" else t + 6_000 if k == "irqdesc.entry" else t, *r)
            for k, t, *r in ONE_WAKE]  # fmt: skip
    assert budget(wakes(frame(*late)))["wakes"] == 0  # type: ignore[arg-type]


def test_xen_and_dom0_on_one_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(shared_path(f"recordings/xen-2l/dom0-light.{end}")) for end in ("xentrace.zst", "dat.zst")]
    ingest(names, tmp_path / "d", IngestOptions())
    dataset = Dataset.open(tmp_path / "d")
    events = dataset.events().with_columns(pl.col("kind").cast(pl.String)).filter(pl.col("kind").is_in(list(KINDS)))
    found = wakes(events.collect())
    assert found.height > 1_000
    for earlier, later in pairwise(MOMENTS):
        assert (found[earlier] <= found[later]).all()
    result = budget(found)
    assert sum(p["ns"] for p in result["parts"]) == result["total_ns"]
    assert abs(sum(p["share"] for p in result["parts"]) - 1) < 1e-9
    assert budget_text(result)[-1].split()[0] == "100.00%"
    # Independent: every handler of the table is a record of dom0's own trace on that vCPU, at that moment.
    own = dataset.scan("irq_handler_entry").select(handler="t_ns", vcpu=pl.col("cpu").cast(pl.Int64)).collect()
    assert found.join(own.unique(), on=["handler", "vcpu"], how="semi").height == found.height
    capsys.readouterr()
    assert cli.run(["info", str(tmp_path / "d"), "--budget", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["wakes"] == found.height
