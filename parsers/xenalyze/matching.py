"""One declared line pattern against many texts, with polars."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from parsers.xenalyze.grammar import Pattern
from parsers.xenalyze.names import RUNSTATES, SCHED_OPS, SVM_EXITS, VCPU_OPS, VMX_EXITS
from parsers.xenalyze.words import TABLES, decode_words, form_of

__all__ = ["match_pattern"]

_WORDS = {"idle": True, "busy": False, "checking": True, "skipping": False, "fake": True, "real": False}
#: What an absent part of a line stands for.
_ABSENT: dict[tuple[str, str], int] = {
    ("TRC_CSCHED2_RUNQ_CANDIDATE", "tickled_cpu"): 0xFFFFFFFF,
    ("TRC_HVM_INTR_WINDOW", "queued_vector"): -1,
    ("TRC_SNULL_SCHEDULE", "dom"): -1,
    ("TRC_SNULL_SCHEDULE", "unit"): -1,
}
_EXITS = {**VMX_EXITS, **SVM_EXITS}


def match_pattern(pattern: Pattern, texts: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The rows of `texts` (`row`, `text`) that the pattern takes, and their columns."""
    if not pattern.fields:
        hits = texts.filter(pl.col("text").str.contains(pattern.regex))
        return hits, _constant(pattern, hits.height)
    frame = texts.select(
        "row", matched=pl.col("text").str.contains(pattern.regex), g=pl.col("text").str.extract_groups(pattern.regex)
    )
    frame = frame.filter("matched").unnest("g")
    bad = pl.lit(False)
    exprs: dict[str, pl.Expr] = {}
    for name, kind in pattern.fields:
        target, _, how = name.partition("__")
        column = pl.col(name) if kind != "u" else pl.col(f"{name}__a")
        value: pl.Expr
        if kind == "u":
            value = column.cast(pl.Int64, strict=False) * 1000 + pl.col(f"{name}__b").cast(pl.Int64, strict=False)
        elif how == "yes":
            value = column.is_not_null()
        elif how == "word":
            value = column.replace_strict(_WORDS, default=None, return_dtype=pl.Boolean)
        elif how == "not":
            value = column != "not"
        elif kind == "r":
            value = column.replace_strict(RUNSTATES, default=None, return_dtype=pl.Int64)
        elif kind == "e":
            number = column.str.to_integer(base=16, strict=False, dtype=pl.UInt64)
            value = column.replace_strict(_EXITS, default=None, return_dtype=pl.UInt64)
            value = pl.when(value.is_null()).then(number).otherwise(value)
        elif kind == "x":
            value = column.str.to_integer(base=16, strict=False, dtype=pl.UInt64)
            bad = bad | (column.is_not_null() & value.is_null())
        elif kind == "d":
            value = _decimal(pattern.table, name, column)
            bad = bad | (column.is_not_null() & value.is_null())
        else:
            value = column
        exprs[target] = value
    frame = frame.filter(~bad).select("row", **exprs)
    columns: dict[str, Any] = {n: frame[n] for n in exprs}
    for (table, name), absent in _ABSENT.items():
        if table == pattern.table and name in columns:
            columns[name] = columns[name].fill_null(absent)
    columns = _special(pattern, columns)
    return frame, {**_constant(pattern, frame.height), **_fitted(pattern.table, columns)}


def _constant(pattern: Pattern, rows: int) -> dict[str, Any]:
    return {} if pattern.event is None else {"event": np.full(rows, pattern.event, np.uint32)}


def _type_of(table: str, name: str) -> Any:
    return next((column.type for column in TABLES[table].columns if column.name == name), None)


def _decimal(table: str, name: str, column: pl.Expr) -> pl.Expr:
    kind = str(_type_of(table, name))
    if kind == "uint64":
        return column.cast(pl.UInt64, strict=False)
    value = column.cast(pl.Int64, strict=False)
    if kind == "uint32" or name.startswith("w"):  # printed with %d: the upper half comes out negative
        return pl.when(value < 0).then(value + (1 << 32)).otherwise(value)
    return value


def _special(pattern: Pattern, columns: dict[str, Any]) -> dict[str, Any]:
    """Columns that need more than one group of the line."""
    if pattern.table == "TRC_SCHED_RUNSTATE_CHANGE":
        states = columns["old_state"].to_numpy() << 8 | columns["new_state"].to_numpy() << 4
        columns["event"] = pl.Series((0x21001 | states).astype(np.uint32))
    elif pattern.event is not None and "w0" in columns:
        words = [columns.pop(f"w{i}").to_numpy() if f"w{i}" in columns else None for i in range(7)]
        form = form_of(pattern.event, 7)
        if form is not None:
            columns |= decode_words(form, pattern.event, words)
    elif pattern.table == "TRC_HVM_INTR":
        # SVM records no vector and the tool prints 0, which is no vector that can arrive.
        vector = columns["vector"]
        columns["vector"] = vector.to_frame().select(pl.when(pl.col("vector") != 0).then("vector")).to_series()
    elif pattern.table.startswith("TRC_PV_HYPERCALL_") or pattern.table == "TRC_PV_HYPERCALL_V2":
        columns |= _hypercall(columns.pop("opname", None), columns.pop("detail", None))
    return columns


def _hypercall(opname: pl.Series | None, detail: pl.Series | None) -> dict[str, Any]:
    """Arguments that the detail of a hypercall line names."""
    if detail is None or opname is None or not detail.is_not_null().any():
        return {}
    frame = pl.DataFrame({"op": opname, "detail": detail.str.strip_chars()})
    head = pl.col("detail").str.extract(r"^(\w+?)(?:\s.*)?$")
    number = pl.col("detail").str.extract(r"(-?\d+) (?:updates|calls|ops)").cast(pl.Int64, strict=False)
    number = pl.when(number < 0).then(number + (1 << 32)).otherwise(number).cast(pl.UInt64, strict=False)
    vcpu = pl.col("detail").str.extract(r" vcpu (\d+)$").cast(pl.UInt64, strict=False)
    named = (
        pl.when(pl.col("op") == "vcpu_op")
        .then(head.replace_strict(VCPU_OPS, default=None, return_dtype=pl.UInt64))
        .when(pl.col("op") == "sched_op")
        .then(head.replace_strict(SCHED_OPS, default=None, return_dtype=pl.UInt64))
    )
    counted = pl.col("op").is_in(["mmu_update", "multicall", "mmuext_op"])
    out = frame.select(
        a0=named,
        a1=pl.when(pl.col("op") == "vcpu_op").then(vcpu).when(counted).then(number),
        a2=pl.when(pl.col("op") == "grant_table_op").then(number),
    )
    return {name: out[name] for name in out.columns}


def _fitted(table: str, columns: dict[str, Any]) -> dict[str, Any]:
    """Only the columns that the table has."""
    names = {column.name for column in TABLES[table].columns}
    return {name: value for name, value in columns.items() if name in names}
