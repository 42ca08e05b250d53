"""SQL over a dataset: its tables, what their columns mean, and answers that stay bounded."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.declare import UsageError
from tracetool.output import whole_files
from tracetool.report.verdict import finding_id
from tracetool.store import Dataset
from tracetool.terminal import clean

__all__ = [
    "FINDINGS_SCHEMA", "FORMATS", "Answer", "ask", "columns_of", "findings_frame", "quoted",
    "render_frame", "table_names", "tables_of", "write_frame",
]  # fmt: skip

#: Output formats, by the suffix that a file name may have instead of `--format`.
FORMATS: Final[Mapping[str, str]] = {
    ".csv": "csv", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip

#: Tables that every dataset has, beside the record tables.
BUILT_IN: Final[Mapping[str, str]] = {
    "events": "canonical events: the recording in the vocabulary of the models",
    "gaps": "where records are missing",
    "notes": "oddities that the reader met",
    "findings": "every finding of the replays (made when asked for)",
}

#: Prose of the canonical event columns; `origin` of the file is spread into its three last columns here.
EVENT_COLUMNS: Final[Mapping[str, tuple[str, str]]] = {
    "seq": ("", "global order of canonical events, from 0"),
    "t_ns": ("ns", "time since the first stamped record; in ticks when the clock model says so"),
    "t_err_ns": ("ns", "the true time lies in [t_ns, t_ns + t_err_ns]"),
    "src": ("", "recording"),
    "src_seq": ("", "seq of the record in its table"),
    "sys": ("", "system that the kind belongs to"),
    "kind": ("", "kind of event"),
    "role": ("", "stimulus, outcome, response, context, marker or predicted"),
    "cpu": ("", "physical CPU"),
    "dom": ("", "domain"),
    "vcpu": ("", "virtual CPU"),
    "obj": ("", "object: channel, GSI, INTID, irq, port or vector, as the kind says"),
    "tgt": ("", "target: CPU, vCPU, LR index, as the kind says"),
    "val": ("", "value, as the kind says"),
    "val2": ("", "second value, as the kind says"),
    "flags": ("", "bits, as the kind says"),
    "conf": ("", "confidence of the translation, 0 to 100"),
    "cause_seq": ("", "seq of the event that caused this one, when known"),
    "body_id": ("", "groups the events of one handler body"),
    "file": ("", "recording"),
    "offset": ("bytes or lines", "where in the recording"),
    "raw_kind": ("", "the recorder's own name of the record"),
}

_FINDING_COLUMNS: Final[tuple[tuple[str, Any, str, str], ...]] = (
    ("id", pl.String, "", "system:policy:episode, as `tracetool explain` takes it"),
    ("system", pl.String, "", "system that was replayed"),
    ("policy", pl.String, "", "policy of the run"),
    ("mode", pl.String, "", "verify: against what was recorded; what-if: predicted"),
    ("code", pl.String, "", "divergence code"),
    ("severity", pl.String, "", "error, warn or info"),
    ("t_ns", pl.Int64, "ns", "when it was detected"),
    ("t_first_ns", pl.Int64, "ns", "when it began, if earlier"),
    ("cpu", pl.Int64, "", "physical CPU"),
    ("dom", pl.Int64, "", "domain"),
    ("vcpu", pl.Int64, "", "virtual CPU"),
    ("obj", pl.Int64, "", "channel, GSI, INTID, irq, port or vector"),
    ("tgt", pl.Int64, "", "target, as the code says"),
    ("val", pl.Int64, "", "value, as the code says"),
    ("expected", pl.String, "", "what the model says should have happened"),
    ("observed", pl.String, "", "what happened"),
    ("confidence", pl.Int64, "", "0 to 100"),
    ("source", pl.String, "", "recording"),
    ("offset", pl.Int64, "bytes or lines", "where in the recording; null when the model computed it"),
    ("episode", pl.Int64, "", "groups repeats"),
    ("rule", pl.String, "", "ids of the rules"),
    ("tags", pl.String, "", "tags, separated by commas"),
)
#: Columns of `findings_frame`.
FINDINGS_SCHEMA: Final[Mapping[str, Any]] = {name: dtype for name, dtype, _, _ in _FINDING_COLUMNS}

#: Characters of a cell on the terminal.
CELL: Final = 60


# -- tables --------------------------------------------------------------------------------------------------------


def findings_frame(runs: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Every finding of some runs, one row each; columns as `FINDINGS_SCHEMA`."""
    rows = [
        {
            **{name: finding.get(name) for name in FINDINGS_SCHEMA},
            "id": finding_id(run, finding),
            "system": run["system"],
            "policy": run["policy"],
            "mode": run["mode"],
            "tags": ",".join(finding.get("tags") or ()),
        }
        for run in runs
        for finding in run["findings"]
    ]
    return pl.DataFrame(rows, schema=FINDINGS_SCHEMA)


def table_names(dataset: Dataset) -> dict[str, str]:
    """Record tables by the name they have in SQL: their own, or `record_<name>` where a built-in table has it."""
    return {(f"record_{name}" if name in BUILT_IN else name): name for name in sorted(dataset.tables())}


def quoted(name: str) -> str:
    """A name as SQL wants it: quoted where it is not a plain word."""
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'


def _events(dataset: Dataset) -> pl.LazyFrame:
    """Canonical events with `origin` spread, so that plain columns answer plain questions."""
    origin = pl.col("origin").struct
    spread = [origin.field(name) for name in ("file", "offset", "raw_kind")]
    return _plain(dataset.events().with_columns(*spread).drop("origin"))


def _plain(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Categories as strings: SQL's LIKE and || know no others."""
    return frame.with_columns(pl.selectors.by_dtype(pl.Categorical).cast(pl.String))


def _small(dataset: Dataset, name: str) -> pl.LazyFrame:
    return pl.scan_parquet(dataset.path / f"{name}.parquet", glob=False)


def tables_of(dataset: Dataset) -> list[dict[str, Any]]:
    """Every table: `table` (its name in SQL), `rows` (null for findings, which are made when asked for), `doc`."""
    found: list[dict[str, Any]] = []
    for name, doc in BUILT_IN.items():
        rows = None if name == "findings" else pq.read_metadata(dataset.path / f"{name}.parquet").num_rows
        found.append({"table": name, "rows": rows, "doc": doc})
    for shown, name in table_names(dataset).items():
        meta = dataset.schema(name).metadata or {}
        rows = dataset.manifest["tables"][name].get("rows")
        found.append({"table": shown, "rows": rows, "doc": _text(meta.get(b"doc"))})
    return found


def columns_of(dataset: Dataset, table: str) -> list[dict[str, str]]:
    """Columns of a table: `column`, `type`, `unit`, `doc`; UsageError names tables that are nearly called so."""
    if table == "findings":
        return [{"column": n, "type": str(t()), "unit": u, "doc": d} for n, t, u, d in _FINDING_COLUMNS]
    if table == "events":
        types = _events(dataset).collect_schema()
        return [
            {"column": n, "type": str(t), "unit": EVENT_COLUMNS.get(n, ("", ""))[0],
             "doc": EVENT_COLUMNS.get(n, ("", ""))[1]}
            for n, t in types.items()
        ]  # fmt: skip
    if table in BUILT_IN:
        return [_column(f) for f in pq.read_schema(dataset.path / f"{table}.parquet")]
    names = table_names(dataset)
    if table not in names:
        raise UsageError(_no_table(table, dataset))
    return [_column(f) for f in dataset.schema(names[table])]


def _column(field: Any) -> dict[str, str]:
    meta = field.metadata or {}
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return {
        "column": field.name, "type": str(kind), "unit": _text(meta.get(b"unit")), "doc": _text(meta.get(b"doc")),
    }  # fmt: skip


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")


def _no_table(table: str, dataset: Dataset) -> str:
    known = [*BUILT_IN, *table_names(dataset)]
    lower = {name.lower(): name for name in known}
    near = [lower[n] for n in difflib.get_close_matches(table.lower(), list(lower), 3, 0.5)]
    hint = f"did you mean {' or '.join(quoted(n) for n in near)}?" if near else "list them: tracetool query DATASET"
    return f"no table {table!r}; {hint}"


# -- questions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """Rows of a query; `more` when the limit left some out."""

    frame: pl.DataFrame
    more: bool


def ask(
    dataset: Dataset, sql: str, *, limit: int | None = None, runs: Callable[[], Sequence[Mapping[str, Any]]]
) -> Answer:
    """Run one SQL query. `runs` is called only when the query mentions `findings`.

    UsageError, in one line, for whatever is wrong with the query.
    """
    if limit is not None and limit < 0:
        raise UsageError(f"--limit wants a number of rows from 0 on, not {limit}")
    frames: dict[str, Any] = {"events": _events(dataset)}
    frames |= {name: _small(dataset, name) for name in ("gaps", "notes")}
    frames |= {shown: _plain(dataset.scan(name)) for shown, name in table_names(dataset).items()}
    if re.search(r"\bfindings\b", sql, re.IGNORECASE):
        frames["findings"] = findings_frame(runs()).lazy()
    with _one_line(dataset):
        answer = pl.SQLContext(frames, eager=False).execute(sql)
        frame = (answer if limit is None else answer.head(limit + 1)).collect()
    if limit is not None and frame.height > limit:
        return Answer(frame.head(limit), True)
    return Answer(frame, False)


@contextmanager
def _one_line(dataset: Dataset) -> Iterator[None]:
    """Turns what polars says about a query into one line that says what to do."""
    try:
        yield
    except BaseException as error:
        # A panic of the engine derives from BaseException: it is still the query's fault, not ours.
        if not isinstance(error, pl.exceptions.PolarsError) and type(error).__name__ != "PanicException":
            raise
        raise UsageError(_explained(str(error), dataset)) from None


def _explained(text: str, dataset: Dataset) -> str:
    first = (text.splitlines() or [""])[0]
    missing = re.search(r"relation '(.*)' was not found", first)
    if missing:
        return _no_table(missing[1], dataset)
    column = re.search(r'unable to find column "(.*?)"', first)
    if column:
        known = re.findall(r'"([^"]*)"', first.partition("valid columns:")[2])
        near = difflib.get_close_matches(column[1], known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see: tracetool query DATASET --table NAME"
        return f"no column {column[1]!r}; {hint}"
    return f"the query does not work: {first[:300]}; tables: tracetool query DATASET"


# -- output --------------------------------------------------------------------------------------------------------


def render_frame(frame: pl.DataFrame) -> str:
    """A frame as aligned text; whatever a guest put into it is made harmless and cut to `CELL` characters."""
    if not frame.width:
        return "(no columns)"
    numeric = [frame[name].dtype.is_numeric() for name in frame.columns]
    body = [[_cell(value) for value in row] for row in frame.iter_rows()]
    heads = [_cut(clean(name)) for name in frame.columns]
    widths = [max(len(head), *(len(row[i]) for row in body)) if body else len(head) for i, head in enumerate(heads)]

    def line(cells: Sequence[str]) -> str:
        parts = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(heads), line(["-" * w for w in widths]), *map(line, body)])


def _cell(value: object) -> str:
    return "" if value is None else _cut(clean(str(value)))


def _cut(text: str) -> str:
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """CSV has neither lists nor structures: they become JSON text; categories become plain strings."""
    changed = []
    for name, dtype in frame.schema.items():
        if dtype.is_nested() or dtype == pl.Binary:
            values = [None if v is None else json.dumps(v, default=str) for v in frame[name].to_list()]
            changed.append(pl.Series(name, values, dtype=pl.String))
    return frame.with_columns(changed) if changed else frame


def csv_text(frame: pl.DataFrame) -> str:
    """A frame as CSV with a heading."""
    return _flat(frame).write_csv()


def json_text(frame: pl.DataFrame, more: bool = False) -> str:
    """A frame as the object that `query --json` prints."""
    document = {"schema": 1, "columns": frame.columns, "rows": list(_rows(frame)), "more": more}
    return json.dumps(document, default=str)


def _rows(frame: pl.DataFrame) -> Iterator[dict[str, Any]]:
    yield from frame.iter_rows(named=True)


def write_frame(frame: pl.DataFrame, output: Path, format: str | None) -> int:
    """Write a frame beside its place and rename it; returns its size in bytes.

    `format` is csv, json, parquet or arrow; None: what the file's name ends in.
    """
    chosen = format or FORMATS.get(output.suffix.lower())
    if chosen not in set(FORMATS.values()):
        raise UsageError(f"{output}: name it .csv, .json, .parquet or .arrow, or give --format")
    with whole_files(output) as (staging,):
        if chosen == "csv":
            _flat(frame).write_csv(staging)
        elif chosen == "json":
            staging.write_text(json.dumps(list(_rows(frame)), default=str) + "\n", encoding="utf-8")
        elif chosen == "parquet":
            frame.write_parquet(staging)
        else:
            frame.write_ipc(staging)
    return output.stat().st_size
