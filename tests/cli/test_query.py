"""`tracetool query`: counts against the recorder's own, quoting, bounds, files, and errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.declare import UsageError
from tests.cli.small import ESCAPES, HOSTILE_TABLE, hostile_dataset, sample_dataset
from tests.cli.test_commands import tracetool
from tracetool.query import ask, columns_of, quoted, render_frame, tables_of, write_frame
from tracetool.replaying import Settings, replay_dataset
from tracetool.store import Dataset


def no_runs() -> Sequence[Mapping[str, Any]]:
    raise AssertionError("no replay was asked for")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return sample_dataset(tmp_path_factory.mktemp("query") / "d")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return hostile_dataset(tmp_path_factory.mktemp("query") / "h")


def test_every_record_table_answers_with_the_recorders_own_count(dataset: Dataset) -> None:
    for name, count in dataset.manifest["counts"].items():
        frame = ask(dataset, f"SELECT count(*) AS n FROM {quoted(name)}", runs=no_runs).frame
        assert frame["n"].to_list() == [count], name


def test_help_lists_every_table_with_its_rows(dataset: Dataset) -> None:
    rows = {t["table"]: t["rows"] for t in tables_of(dataset)}
    assert rows["events"] == dataset.manifest["events"]
    assert rows["gaps"] == 0
    assert {k: v for k, v in rows.items() if k in dataset.tables()} == dataset.manifest["counts"]
    assert all(t["doc"] for t in tables_of(dataset))


def test_columns_come_with_the_units_and_prose_of_the_schema(dataset: Dataset) -> None:
    columns = {c["column"]: c for c in columns_of(dataset, "TRC_PM_IDLE_ENTRY")}
    for field in pq.read_schema(dataset.table_path("TRC_PM_IDLE_ENTRY")):
        assert columns[field.name]["doc"] == field.metadata[b"doc"].decode()
        assert columns[field.name]["unit"] == field.metadata[b"unit"].decode()


@pytest.mark.parametrize("table", ["events", "gaps", "notes", "findings"])
def test_help_of_built_in_tables_is_what_a_query_gives(dataset: Dataset, table: str) -> None:
    described = columns_of(dataset, table)
    assert all(c["doc"] for c in described)
    answer = ask(dataset, f"SELECT * FROM {table} LIMIT 1", runs=lambda: replay_dataset(dataset, Settings()))
    assert [c["column"] for c in described] == answer.frame.columns


def test_findings_are_those_of_a_replay(dataset: Dataset) -> None:
    runs = replay_dataset(dataset, Settings())
    sql = "SELECT code, count(*) AS n FROM findings GROUP BY code"
    got = {r["code"]: r["n"] for r in ask(dataset, sql, runs=lambda: runs).frame.to_dicts()}
    want: dict[str, int] = {}
    for finding in runs[0]["findings"]:
        want[finding["code"]] = want.get(finding["code"], 0) + 1
    assert got == want
    assert want


def test_a_window_over_events_agrees_with_polars(dataset: Dataset) -> None:
    sql = "SELECT cpu, sum(t_ns) AS t FROM events WHERE kind = 'idle.enter' GROUP BY cpu ORDER BY cpu"
    events = dataset.events().filter(pl.col("kind").cast(pl.String) == "idle.enter").collect()
    want = events.group_by("cpu").agg(pl.col("t_ns").sum()).sort("cpu").rows()
    assert ask(dataset, sql, runs=no_runs).frame.rows() == want


def test_limit_bounds_and_says_so(dataset: Dataset) -> None:
    sql = "SELECT seq FROM events ORDER BY seq"
    answer = ask(dataset, sql, limit=5, runs=no_runs)
    assert (answer.frame["seq"].to_list(), answer.more) == ([0, 1, 2, 3, 4], True)
    everything = ask(dataset, sql, limit=dataset.manifest["events"], runs=no_runs)
    assert (everything.frame.height, everything.more) == (dataset.manifest["events"], False)
    with pytest.raises(UsageError, match="--limit"):
        ask(dataset, sql, limit=-1, runs=no_runs)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT * FROM xyzzy", "tracetool query DATASET"),
        ("SELECT * FROM TRC_PM_IDLE_ENTRI", "TRC_PM_IDLE_ENTRY"),
        ("SELECT kin FROM events", "kind"),
        ("SELEC 1", "does not work"),
        ("", "does not work"),
        ("SELECT 1; SELECT 2", "does not work"),
        ("SELECT sum(kind) FROM events", "does not work"),
        ("UPDATE events SET cpu = 1", "does not work"),
        ("SELECT * FROM events WHERE", "does not work"),
    ],
)
def test_a_wrong_query_is_one_line_that_says_what_to_do(dataset: Dataset, sql: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(dataset, sql, runs=no_runs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_query_on_the_command_line(dataset: Dataset, tmp_path: Path) -> None:
    done = tracetool("query", dataset.path, "SELECT * FROM nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_command(dataset: Dataset, tmp_path: Path) -> None:
    sql = "SELECT cpu, kind, count(*) AS n FROM events GROUP BY cpu, kind ORDER BY cpu, kind"
    done = tracetool("query", dataset.path, sql, "--limit", "3", cwd=tmp_path)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 5  # heading, rule, rows
    assert "--limit" in done.stderr
    document = json.loads(tracetool("query", dataset.path, sql, "--json", cwd=tmp_path).stdout)
    assert document["columns"] == ["cpu", "kind", "n"]
    assert sum(r["n"] for r in document["rows"]) == dataset.manifest["events"]
    done = tracetool("query", dataset.path, sql, "-o", "a.csv", cwd=tmp_path)
    assert done.stdout == ""
    assert pl.read_csv(tmp_path / "a.csv")["n"].sum() == dataset.manifest["events"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "xlsx", "SELECT 1"],
        ["--format", "parquet", "SELECT 1"],
        ["SELECT 1", "-o", "a.txt"],
        ["-o", "a.csv"],
        ["SELECT 1", "--table", "events"],
        ["--table", "event"],
    ],
    ids=" ".join,
)
def test_usage_errors(dataset: Dataset, arguments: list[str], tmp_path: Path) -> None:
    done = tracetool("query", dataset.path, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.glob("a.*")) == []


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet", "arrow"])
def test_files_hold_the_same_rows(dataset: Dataset, suffix: str, tmp_path: Path) -> None:
    frame = ask(dataset, 'SELECT seq, kind, cpu, val, "offset" FROM events ORDER BY seq', runs=no_runs).frame
    frame = frame.with_columns(pl.col("kind").cast(pl.String))
    path = tmp_path / f"out.{suffix}"
    assert write_frame(frame, path, None) == path.stat().st_size
    read: Any = {"csv": pl.read_csv, "json": pl.read_json, "parquet": pl.read_parquet, "arrow": pl.read_ipc}[suffix]
    assert read(path).rows() == frame.rows()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_cannot_be_written(dataset: Dataset, tmp_path: Path) -> None:
    done = tracetool("query", dataset.path, "SELECT 1", "-o", "no/such/folder/a.csv", cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert "no/such/folder" in done.stderr


# -- hostile names -------------------------------------------------------------------------------------------------


def test_a_hostile_table_is_reached_by_its_quoted_name(hostile: Dataset) -> None:
    names = [t["table"] for t in tables_of(hostile)]
    assert HOSTILE_TABLE in names
    assert ask(hostile, f"SELECT count(*) AS n FROM {quoted(HOSTILE_TABLE)}", runs=no_runs).frame["n"][0] == 1
    # A recorder's table never hides one of ours.
    assert ask(hostile, "SELECT reason FROM gaps", runs=no_runs).frame.height == 2
    assert ask(hostile, "SELECT comm FROM record_gaps", runs=no_runs).frame.height == 1


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_any_name_can_be_quoted(name: str) -> None:
    context = pl.SQLContext({name: pl.LazyFrame({"a": [7]})}, eager=True)
    assert context.execute(f"SELECT a FROM {quoted(name)}")["a"].to_list() == [7]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--table", HOSTILE_TABLE],
        ["SELECT * FROM events"],
        [f"SELECT * FROM {quoted(HOSTILE_TABLE)}"],
        ["SELECT * FROM gaps"],
        ["SELECT * FROM notes"],
        [f'SELECT 1 AS "{ESCAPES}"'],
        [f'SELECT * FROM "nowhere{ESCAPES}"'],
        [f'SELECT "{ESCAPES}" FROM events'],
        ["SELECT * FROM events", "--json"],
    ],
    ids=range(10),
)
def test_nothing_recorded_controls_the_terminal(hostile: Dataset, arguments: list[str], tmp_path: Path) -> None:
    done = tracetool("query", hostile.path, *arguments, cwd=tmp_path)
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr
    for text in (done.stdout, done.stderr):
        assert not set(text) & set(ESCAPES) - set(map(chr, range(32, 127)))


def test_long_cells_are_cut() -> None:
    text = render_frame(pl.DataFrame({"a": ["x" * 5000], "b": [1]}))
    assert max(map(len, text.splitlines())) < 80
