"""The Python API: its documentation and its notebook run, and it says the same as the command line.

The notebook's cells are executed in order in one namespace, without Jupyter: what is tested is that the code runs and
that its last expressions have values, not the notebook's own rendering.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

import tracetool
from parsers.recording import RecordingError
from replay.declare import UsageError
from replay.systems import SYSTEMS
from tests.cli.small import SAMPLE, sample_dataset
from tests.cli.test_commands import tracetool as command
from tests.shared import ROOT
from tracetool.api import Trace
from tracetool.store import StoreError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, and the recording under the name that the documentation uses."""
    folder = tmp_path_factory.mktemp("api")
    sample_dataset(folder / "boot.dataset")
    (folder / SAMPLE.name).write_bytes(SAMPLE.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture(scope="module")
def trace(folder: Path) -> Trace:
    return tracetool.open(folder / "boot.dataset")


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, tracetool; heavy = {'polars', 'pyarrow', 'numpy', 'typer'} & set(sys.modules);"
        "assert not heavy, heavy; tracetool.open; assert 'polars' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError):
        tracetool.nonsense  # noqa: B018 - the access is the test


def test_tables_and_columns(trace: Trace) -> None:
    tables = dict(trace.tables().select("table", "rows").rows())
    assert {k: v for k, v in tables.items() if k.startswith("TRC_")} == trace.manifest["counts"]
    schema = pq.read_schema(trace.path / "records" / "TRC_PM_IDLE_EXIT.parquet")
    assert trace.columns("TRC_PM_IDLE_EXIT")["column"].to_list() == schema.names


def test_frames_hold_what_the_files_hold(trace: Trace) -> None:
    assert isinstance(trace.events(), pl.LazyFrame)
    assert trace.events().collect().equals(pl.read_parquet(trace.path / "events.parquet"))
    for name, count in trace.manifest["counts"].items():
        assert trace.records(name).select(pl.len()).collect().item() == count
    assert trace.gaps().height == 0
    assert trace.notes().height == pq.read_metadata(trace.path / "notes.parquet").num_rows


@pytest.mark.parametrize("system", SYSTEMS)
def test_events_of_a_system_are_the_kinds_it_reads(trace: Trace, system: str) -> None:
    got = trace.events(system).collect()
    everything = trace.events().with_columns(pl.col("kind").cast(pl.String)).collect()
    assert got.height == everything.filter(pl.col("kind").is_in(list(SYSTEMS[system].kinds))).height


def test_findings_are_those_of_the_command_line(trace: Trace, tmp_path: Path) -> None:
    done = command("replay", trace.path, "-p", "current", "-p", "proposed", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    want = [(r["policy"], f["code"], f["t_ns"], f["cpu"], f["offset"], f["episode"]) for r in document["runs"]
            for f in r["findings"]]  # fmt: skip
    got = trace.findings(policy=["current", "proposed"])
    assert got.select("policy", "code", "t_ns", "cpu", "offset", "episode").rows() == want
    assert got["id"][0] == f"hpet:current:{got['episode'][0]}"


def test_thresholds(trace: Trace) -> None:
    usual = trace.findings("hpet").filter(pl.col("code") == "hpet-late-wakeup").height
    loose = trace.findings("hpet", set={"hpet": {"slop_ns": 10**8}}).filter(pl.col("code") == "hpet-late-wakeup").height
    assert loose < usual


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t.events("moon"),
        lambda t: t.records("TRC_NOTHING"),
        lambda t: t.columns("TRC_NOTHING"),
        lambda t: t.replay(system="moon"),
        lambda t: t.replay(policy="moon"),
        lambda t: t.findings(set={"moon": {}}),
        lambda t: t.findings(set={"hpet": {"moon": 1}}),
        lambda t: t.sql("SELECT"),
    ],
)
def test_mistakes_are_one_line(trace: Trace, wrong: Any) -> None:
    with pytest.raises(UsageError) as caught:
        wrong(trace)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="tracetool ingest"):
        tracetool.open(tmp_path)


def test_a_recording_is_the_same_as_its_dataset(folder: Path, trace: Trace) -> None:
    opened = tracetool.open(str(folder / SAMPLE.name))
    assert opened.path.is_relative_to(folder / "cache")
    assert opened.manifest["inputs"][0]["sha256"] == trace.manifest["inputs"][0]["sha256"]
    assert opened.events().collect().equals(trace.events().collect())
    assert opened.manifest["command"].startswith("tracetool.open(")
    assert opened.findings(system="hpet").equals(trace.findings(system="hpet"))


def test_a_damaged_recording_warns_and_keeps_the_rest(tmp_path: Path) -> None:
    data = SAMPLE.read_bytes()
    (tmp_path / "cut.xentrace").write_bytes(data[: len(data) // 2 + 3])
    with pytest.warns(UserWarning, match="offset .*the rest was kept") as caught:
        opened = tracetool.open(tmp_path / "cut.xentrace")
    assert [w.filename for w in caught if "offset" in str(w.message)] == [__file__]
    assert opened.manifest["damaged"] and opened.gaps().height and opened.events().collect().height


def test_how_a_recording_is_read_can_be_said(folder: Path) -> None:
    stated = tracetool.open(folder / SAMPLE.name, cpu_hz=2.5e9, xen_version="4.17", format="xentrace", hpet_irqs=[24])
    assert stated.manifest["clock"]["hz"] == 2.5e9
    for wrong in ({"cpu_hz": 1.0}, {"xen_version": "four"}, {"format": "moon"}):
        with pytest.raises((UsageError, RecordingError)):
            tracetool.open(folder / SAMPLE.name, **wrong)
    with pytest.raises(UsageError, match="no such file"):
        tracetool.open(folder / "nowhere")


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Execute a cell; the value of its last expression, as a notebook would show it, or None."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "<cell>", "exec"), names)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def test_the_notebook_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 8
    assert all(c["outputs"] == [] for c in notebook["cells"] if c["cell_type"] == "code")
    names: dict[str, Any] = {}
    values = [run_cell(cell, names) for cell in cells]
    frames = [v for v in values if isinstance(v, pl.DataFrame)]
    assert len(frames) >= 7
    idle = names["idle"]
    assert idle["sleeps"].sum() == 366
    assert (idle["median_ns"] > 0).all()
    assert names["one"]["code"] == "hpet-wrong-cpu"


def test_the_documentation_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "api.md", "exec"), names)
    assert "not visible in this recording" in capsys.readouterr().out


def test_the_documentation_names_every_method(trace: Trace) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in dir(trace):
        if not name.startswith("_"):
            assert f"trace.{name}" in text, name
            assert getattr(type(trace), name).__doc__, name
