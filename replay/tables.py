"""Divergences and metrics of a run as Arrow tables (spec I.4, I.5)."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from replay.driver import Run
from replay.events import NIL, NONE
from replay.sink import Finding

__all__ = ["DIVERGENCES", "METRICS", "divergence_table", "metric_table"]


def _name(index: pa.DataType | None = None) -> pa.DataType:
    return pa.dictionary(index or pa.int16(), pa.string())


#: One row for each divergence, in order of detection.
DIVERGENCES: Final = pa.schema(
    [
        pa.field("div_id", pa.uint64(), nullable=False),
        pa.field("run_id", _name(), nullable=False),
        pa.field("sys", _name(), nullable=False),
        pa.field("policy", _name(), nullable=False),
        pa.field("mode", _name(), nullable=False),
        pa.field("code", _name(), nullable=False),
        pa.field("severity", _name(pa.int8()), nullable=False),
        pa.field("t_ns", pa.int64(), nullable=False),
        pa.field("t_first_ns", pa.int64()),
        pa.field("t_end_ns", pa.int64()),
        pa.field("cpu", pa.int32()),
        pa.field("dom", pa.uint16()),
        pa.field("vcpu", pa.uint16()),
        pa.field("obj", pa.uint32()),
        pa.field("tgt", pa.int32()),
        pa.field("val", pa.int64()),
        pa.field("expected", pa.string()),
        pa.field("observed", pa.string()),
        pa.field("cause_code", _name()),
        pa.field("evidence", pa.list_(pa.struct([("seq", pa.uint64()), ("t_ns", pa.int64()), ("label", pa.string())]))),
        pa.field("rule", _name(), nullable=False),
        pa.field("conf", pa.uint8(), nullable=False),
        pa.field("tags", pa.list_(pa.string())),
    ]
)

#: One row for each named number.
METRICS: Final = pa.schema(
    [
        pa.field("run_id", _name(), nullable=False),
        pa.field("sys", _name(), nullable=False),
        pa.field("policy", _name(), nullable=False),
        pa.field("mode", _name(), nullable=False),
        pa.field("name", _name(), nullable=False),
        pa.field("object", pa.string()),
        pa.field("unit", _name(), nullable=False),
        pa.field("value", pa.int64(), nullable=False),
        pa.field("quality", _name(), nullable=False),
    ]
)


def _given(value: int) -> int | None:
    return None if value in (NONE, NIL) else value


def _row(index: int, run: Run, run_id: str, f: Finding) -> dict[str, Any]:
    return {
        "div_id": index, "run_id": run_id, "sys": run.system, "policy": run.policy, "mode": run.mode,
        "code": f.code.name, "severity": f.severity, "t_ns": f.t,
        "t_first_ns": None if f.t_first == NIL else f.t_first, "t_end_ns": None,
        "cpu": _given(f.cpu), "dom": _given(f.dom), "vcpu": _given(f.vcpu), "obj": _given(f.obj), "tgt": _given(f.tgt),
        "val": None if f.val == NIL else f.val, "expected": f.expected, "observed": f.observed,
        "cause_code": f.cause or None,
        "evidence": [{"seq": e.seq if e.seq != NONE else None, "t_ns": e.t, "label": e.label} for e in f.evidence],
        "rule": f.code.rule, "conf": f.conf, "tags": list(f.tags),
    }  # fmt: skip


def divergence_table(run: Run, *, run_id: str = "") -> pa.Table:
    """The findings of a run, schema `DIVERGENCES`; two runs of the same input give equal tables."""
    name = run_id or f"{run.system}:{run.policy}:{run.mode}"
    return pa.Table.from_pylist([_row(i, run, name, f) for i, f in enumerate(run.findings)], schema=DIVERGENCES)


def metric_table(run: Run, *, run_id: str = "") -> pa.Table:
    """The numbers of a run, schema `METRICS`: `deliveries.d1v0.0xf3` is `deliveries` of object `d1v0.0xf3`."""
    name = run_id or f"{run.system}:{run.policy}:{run.mode}"
    rows = []
    for metric, value in run.metrics.items():
        base, _, obj = metric.partition(".")
        rows.append(
            {
                "run_id": name, "sys": run.system, "policy": run.policy, "mode": run.mode, "name": base,
                "object": obj or None, "unit": "ns" if base.endswith("_ns") else "", "value": value,
                "quality": "measured" if run.mode == "verify" else "predicted",
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=METRICS)
