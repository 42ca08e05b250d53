"""Divergences and metrics as Arrow tables: schema of the specification, content of the run, identical reruns."""

from __future__ import annotations

import pyarrow as pa
import pytest

from replay.scenario import load_scenario, run_scenario
from replay.tables import DIVERGENCES, METRICS, divergence_table, metric_table
from tests.shared import SAMPLES

PATH = SAMPLES / "scenarios" / "s1-handover-wrong-cpu.json"


def test_divergences_hold_what_the_scenario_lists() -> None:
    scenario = load_scenario(PATH)
    table = divergence_table(run_scenario(scenario, "current"))
    assert table.schema.equals(DIVERGENCES)
    rows = table.to_pylist()
    assert [(r["t_ns"], r["code"], r["cpu"], r["obj"], r["val"]) for r in rows] == [
        (500_000, "hpet-affinity-stale", 0, 0, 1),
        (800_000, "hpet-wrong-cpu", 1, 0, 0),
        (2_000_000, "hpet-wrong-cpu", 1, 0, 0),
    ]
    assert {r["dom"] for r in rows} == {None}


def test_metrics_have_units_and_objects() -> None:
    table = metric_table(run_scenario(load_scenario(PATH), "current"))
    assert table.schema.equals(METRICS)
    by_name = {r["name"]: r for r in table.to_pylist()}
    assert by_name["hpet_retargets"]["value"] == 1
    assert by_name["max_lateness_ns"]["unit"] == "ns"
    lapic = run_scenario(load_scenario(SAMPLES / "scenarios" / "s6-eoi-unmatched.json"), "any")
    objects = {(r["name"], r["object"]): r["value"] for r in metric_table(lapic).to_pylist()}
    assert objects["deliveries", "cpu0.0x41"] == 1


@pytest.mark.parametrize("path", sorted((SAMPLES / "scenarios").glob("*.json")), ids=lambda p: p.stem)
def test_reruns_give_byte_identical_tables(path: object) -> None:
    scenario = load_scenario(str(path))
    for policy in scenario.policies:
        tables = []
        for _ in range(2):
            run = run_scenario(scenario, policy)
            sink = pa.BufferOutputStream()
            for table in (divergence_table(run), metric_table(run)):
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
            tables.append(sink.getvalue().to_pybytes())
        assert tables[0] == tables[1]
