"""The bundle: what is in it, what is not, and that its records are those of the recording."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from replay.declare import UsageError
from tests.cli.small import SAMPLE, hostile_dataset, sample_dataset
from tests.cli.test_commands import tracetool
from tests.report import build
from tests.report.test_formats import controls
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Settings, replay_dataset
from tracetool.report import recorded, stories, verdict
from tracetool.report.bundle import write_bundle
from tracetool.report.tables import tables
from tracetool.report.window import STORIES
from tracetool.report.write import findings_json
from tracetool.store import Dataset

NEIGHBOUR, SECRET, PRINTED = "neighbour-task", "unrelated-task", "pass phrase on the console"


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, list[dict[str, Any]]]:
    dataset = sample_dataset(tmp_path_factory.mktemp("bundle") / "d")
    return dataset, replay_dataset(dataset, Settings())


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory, sample: Any) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("zip") / "b.zip"
    write_bundle(*sample, path, command="tracetool report", near=[SAMPLE])
    return contents(path)


def test_what_is_in_it(sample: Any, bundled: dict[str, bytes]) -> None:
    dataset, runs = sample
    told = stories.stories(runs, recorded.times_of(dataset.manifest))[:STORIES]
    windows = [f"records/{n:02d}-{s.id.replace(':', '-')}/records.xentrace" for n, s in enumerate(told, 1)]
    assert list(bundled) == ["report.html", "report.txt", "report.md", "findings.json", *windows, "manifest.json"]
    manifest = json.loads(bundled["manifest.json"])
    assert [f["name"] for f in manifest["files"]] == list(bundled)[:-1]
    for file in manifest["files"]:
        assert file["sha256"] == hashlib.sha256(bundled[file["name"]]).hexdigest()
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256(SAMPLE.read_bytes()).hexdigest()
    beside = tables(dataset, runs, recorded.times_of(dataset.manifest))
    assert bundled["findings.json"].decode() == findings_json(dataset, runs, beside)


def test_two_bundles_are_byte_identical(sample: Any, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        write_bundle(*sample, tmp_path / name, near=[SAMPLE])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip"]


def test_the_records_of_a_window_can_be_read_again(sample: Any, bundled: dict[str, bytes], tmp_path: Path) -> None:
    dataset, runs = sample
    manifest = json.loads(bundled["manifest.json"])
    wrong = next(f for f in runs[0]["findings"] if f["code"] == "hpet-wrong-cpu")
    named = verdict.finding_id(runs[0], wrong)
    file = next(f for f in manifest["files"] if isinstance(f["what"], dict) and f["what"]["finding"] == named)
    offsets = set(file["what"]["offsets"])
    assert {e["offset"] for e in wrong["evidence"] if e["offset"] is not None} <= offsets
    (tmp_path / "w").write_bytes(bundled[file["name"]])
    hz = str(round(dataset.manifest["clock"]["hz"]))
    done = tracetool("ingest", "w", "-o", "again", "--cpu-hz", hz, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)["records"]
    again = Dataset.open(tmp_path / "again")
    assert sum(n for name, n in records.items() if name != "TRC_TRACE_CPU_CHANGE") == len(offsets)
    for name in again.tables() - {"TRC_TRACE_CPU_CHANGE"}:
        payload = [c for c in again.schema(name).names if c not in ("seq", "t_ns", "t_err_ns", "source", "offset")]
        here = dataset.scan(name).filter(pl.col("offset").is_in(list(offsets))).sort("seq").select(payload).collect()
        assert here.equals(again.scan(name).sort("seq").select(payload).collect()), name
    # And what was cut is byte for byte what stands in the recording.
    data, cut = SAMPLE.read_bytes(), bundled[file["name"]]
    for offset in offsets:
        word = int.from_bytes(data[offset : offset + 4], "little")
        assert data[offset : offset + 4 + (word >> 31) * 8 + (word >> 28 & 7) * 4] in cut


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, list[dict[str, Any]], Path]:
    """An ftrace recording with three tasks: one in the window of a finding, two others elsewhere or unread."""
    lines = ["# tracer: nop", "#"]
    for number in range(400):
        task = NEIGHBOUR if 150 <= number < 250 else SECRET
        t = 100.0 + number * 0.01
        head = f" {task:>20}-77    [001] d.h.."
        lines.append(f"{head} {t:.6f}: irq_handler_entry: irq=24 name=virtio0")
        lines.append(f" {SECRET:>20}-78    [001] ..... {t + 1e-5:.6f}: console: {PRINTED}")
        lines.append(f"{head} {t + 2e-5:.6f}: irq_handler_exit: irq=24 ret=handled")
    path = tmp_path_factory.mktemp("linux") / "trace.txt"
    path.write_text("\n".join(lines) + "\n")
    ingest([str(path)], path.parent / "d", IngestOptions())
    dataset = Dataset.open(path.parent / "d")
    runs = replay_dataset(dataset, Settings(systems=("irqflow",)))
    events = dataset.events().filter(pl.col("kind").cast(pl.String) == "irqdesc.entry").collect()
    row = events.row(200, named=True)
    finding = {
        "code": "flow-lost-edge", "severity": "warn", "t_ns": row["t_ns"], "t_first_ns": None, "cpu": 1, "dom": None,
        "vcpu": None, "obj": 24, "tgt": None, "val": None, "expected": "one", "observed": "none", "confidence": 50,
        "source": "trace.txt", "offset": row["origin"]["offset"], "episode": 1, "rank": 0, "rule": "F", "tags": [],
        "caused_by": None, "evidence": [{"t_ns": row["t_ns"], "seq": row["seq"], "label": "handler", "source": "t",
                                         "offset": row["origin"]["offset"]}],
    }  # fmt: skip
    return dataset, [{**runs[0], "findings": [finding], "verdict": "findings"}], path


@pytest.mark.parametrize("at_hand", [True, False])
def test_nothing_else_of_the_guest_is_in_it(linux: Any, tmp_path: Path, at_hand: bool) -> None:
    dataset, runs, path = linux
    if not at_hand:
        path = path.rename(path.with_name("elsewhere"))
    try:
        write_bundle(dataset, runs, tmp_path / "b.zip", near=[path])
    finally:
        path.rename(path.with_name("trace.txt"))
    held = contents(tmp_path / "b.zip")
    names = [n for n in held if n.startswith("records/")]
    folder = "records/01-irqflow-" + runs[0]["policy"] + "-1/"
    rows = [folder + "records.txt"] if at_hand else [folder + f"irq_handler_{w}.csv" for w in ("entry", "exit")]
    assert names == rows
    assert NEIGHBOUR.encode() in held[names[0]]
    for string in (SECRET, PRINTED):
        assert [n for n, data in held.items() if string.encode() in data] == []
    if at_hand:
        given = (path.parent / "trace.txt").read_bytes().splitlines()
        cut = held[names[0]].splitlines()
        assert len(cut) > 4 and set(cut) <= set(given) and cut[0] == given[0]
    else:
        frame = pl.read_csv(held[names[0]])
        assert frame.height > 2 and frame["offset"].is_in(range(1, 1203)).all()


def test_another_file_of_the_same_name_is_not_the_recording(linux: Any, tmp_path: Path) -> None:
    dataset, runs, path = linux
    path = path.rename(path.with_name("elsewhere"))
    (tmp_path / "trace.txt").write_text(f"{SECRET}\n" * 2000)
    try:
        write_bundle(dataset, runs, tmp_path / "b.zip", near=[tmp_path / "trace.txt"])
    finally:
        path.rename(path.with_name("trace.txt"))
    held = contents(tmp_path / "b.zip")
    assert not [n for n in held if n.endswith("records.txt")]
    assert not [n for n, data in held.items() if SECRET.encode() in data]


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    data, runs = build.hostile(tmp_path / "a")
    write_bundle(data, runs, tmp_path / "a.zip", command=build.HOSTILE[3])
    other = hostile_dataset(tmp_path / "b")
    write_bundle(other, replay_dataset(other, Settings(systems=("hpet",))), tmp_path / "b.zip")
    for held in (contents(tmp_path / "a.zip"), contents(tmp_path / "b.zip")):
        for name in held:
            assert not controls(name, "") and ".." not in name and not name.startswith("/")
        assert not controls(held["manifest.json"].decode())
        assert not controls(held["report.txt"].decode())


def test_the_command(tmp_path: Path) -> None:
    done = tracetool("report", SAMPLE, "-p", "current", "--bundle", "b.zip", "-o", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    held = contents(tmp_path / "b.zip")
    assert held["findings.json"] == (tmp_path / "r.json").read_bytes()
    assert any(n.endswith("records.xentrace") for n in held)
    for wrong in (["--bundle", "b.tar"], [], ["-o", "r.docx", "--bundle", "c.zip"]):
        done = tracetool("report", SAMPLE, *wrong, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    with pytest.raises(UsageError, match=r"\.zip"):
        write_bundle(Dataset(tmp_path, {}), [], tmp_path / "x.tgz")
