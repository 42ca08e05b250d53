"""The command line as a user meets it: JSON contract, exit codes, one line for each error, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from replay.systems import SYSTEMS
from tests.shared import SAMPLES, shared_path
from tracetool.cli import run

SAMPLE = SAMPLES / "xen-2l-dom0-idle.xentrace"
FINDING_KEYS = [
    "code", "severity", "t_ns", "cpu", "dom", "vcpu", "obj", "tgt", "val", "expected", "observed", "confidence",
    "offset", "episode",
]  # fmt: skip


def tracetool(*arguments: str | Path, cwd: Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Run the tool; stdout and stderr as text."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tracetool", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, input=stdin, check=False,
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ingested")
    done = tracetool("ingest", SAMPLE, "-o", "d", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "d"


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if "partial" in p.name or ".old-" in p.name]


def test_ingest_json_follows_the_contract(tmp_path: Path) -> None:
    done = tracetool("ingest", SAMPLE, "-o", "d", "--json", cwd=tmp_path)
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert set(document) == {"schema", "output", "bytes", "records", "gaps", "clock", "notes"}
    assert document["schema"] == 1
    assert document["bytes"] == {"total": 202464, "parsed": 202464, "skipped": 0}
    assert document["records"]["TRC_PM_IDLE_ENTRY"] == 366  # xen-2l/dom0-idle.xentrace.counts.txt
    assert document["records"]["TRC_HW_IRQ_HANDLED"] == 222
    assert sum(document["records"].values()) == 8993
    assert document["gaps"] == []
    assert abs(document["clock"]["hz"] / 2596.155e6 - 1) < 5e-6


def test_dataset_layout(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert {p.name for p in dataset.iterdir()} == {
        "manifest.json", "records", "events.parquet", "gaps.parquet", "notes.parquet",
    }  # fmt: skip
    assert sum(t["rows"] for t in manifest["tables"].values()) == 8993
    for name, table in manifest["tables"].items():
        schema = pq.read_schema(dataset / "records" / f"{table['file']}.parquet")
        assert schema.names[:7] == ["seq", "t_ns", "t_err_ns", "tsc", "cpu", "source", "offset"], name
        assert all(f.metadata and f.metadata[b"doc"] for f in schema), name
    meta = pq.ParquetFile(dataset / "records" / "TRC_PM_IDLE_ENTRY.parquet").metadata.row_group(0)
    assert "DELTA_BINARY_PACKED" in meta.column(0).encodings


def test_info_answers_what_a_person_asks_first(dataset: Path, tmp_path: Path) -> None:
    text = tracetool("info", dataset, cwd=tmp_path).stdout
    wishes = ("span", "CPUs      0, 1, 2, 3", "d0 (4 vCPUs)", "2596.155 MHz", "gaps      none", "inferred", "blind")
    for wanted in wishes:
        assert wanted in text
    document = json.loads(tracetool("info", dataset, "--json", cwd=tmp_path).stdout)
    states = {r["rule"]: r["state"] for r in document["systems"]["hpet"]}
    assert states["hpet-wrong-cpu"] == "inferred"
    assert states["hpet-blocked-by-isr"] == "blind"
    assert {r["state"] for r in document["systems"]["evtchn"]} == {"blind"}


def test_replay_json_follows_the_contract(dataset: Path, tmp_path: Path) -> None:
    done = tracetool("replay", dataset, "-p", "current", "-p", "proposed", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert list(document) == ["schema", "runs", "coverage"]
    verify, what_if = document["runs"]
    assert list(verify) == [
        "system", "policy", "mode", "verdict", "horizon_ns", "seen", "calibration", "findings", "suppressed", "metrics",
    ]  # fmt: skip
    assert verify["calibration"] is None and what_if["calibration"]["state"] in ("calibrated", "uncalibrated")
    states = {c["rule"]: c["state"] for c in document["coverage"]}
    assert set(states) == {code.name for system in SYSTEMS.values() for code in system.codes}
    assert verify["seen"]["blind"] == sum(states[code.name] == "blind" for code in SYSTEMS["hpet"].codes)
    assert (verify["system"], verify["policy"], verify["mode"]) == ("hpet", "current", "verify")
    assert (what_if["policy"], what_if["mode"]) == ("proposed", "what-if")
    assert what_if["horizon_ns"] is not None
    assert all(list(f) == FINDING_KEYS for run in document["runs"] for f in run["findings"])
    assert all(set(c) == {"rule", "state", "reason"} for c in document["coverage"])
    assert not [f for f in verify["findings"] if f["severity"] == "error"]
    assert done.returncode == 0


def test_replays_are_byte_identical(dataset: Path, tmp_path: Path) -> None:
    first, second = (tracetool("replay", dataset, "-p", "proposed", "--json", cwd=tmp_path).stdout for _ in range(2))
    assert first == second


def test_a_finding_leads_back_to_the_bytes(dataset: Path, tmp_path: Path) -> None:
    document = json.loads(tracetool("replay", dataset, "--json", cwd=tmp_path).stdout)
    wrong = [f for f in document["runs"][0]["findings"] if f["code"] == "hpet-wrong-cpu"]
    assert wrong
    data = SAMPLE.read_bytes()
    for finding in wrong:
        word = int.from_bytes(data[finding["offset"] : finding["offset"] + 4], "little")
        assert word & 0x0FFFFFFF == 0x802008  # TRC_HW_IRQ_HANDLED


def test_text_tells_of_the_lockstep_and_of_zeros(tmp_path: Path) -> None:
    """How far the hardware models agree with the recorded hardware; no zero of what could not be seen."""
    text = tracetool("replay", SAMPLES / "qemu-arm64-gic.log.gz", "--system", "gic", cwd=tmp_path).stdout
    told = text.split("in lockstep with the hardware of the recording:\n")[1].split("\n")
    assert told[0] == "    gic_ack: 615 seen, 571 foreseen, 44 not decidable, 0 mismatches"
    text = tracetool("replay", SAMPLE, "--system", "hpet", cwd=tmp_path).stdout
    assert "lockstep" not in text
    assert "none:" not in text


def test_scenarios_run_through_the_command(tmp_path: Path) -> None:
    path = SAMPLES / "scenarios" / "s1-handover-wrong-cpu.json"
    done = tracetool("replay", path, "--policy", "current", "--json", cwd=tmp_path)
    assert done.returncode == 1
    run = json.loads(done.stdout)["runs"][0]
    got = [(f["t_ns"], f["code"]) for f in run["findings"]]
    assert got == [(500000, "hpet-affinity-stale"), (800000, "hpet-wrong-cpu"), (2000000, "hpet-wrong-cpu")]
    assert run["metrics"]["hpet_retargets"] == 1
    done = tracetool("replay", path, "--policy", "proposed", "--json", cwd=tmp_path)
    assert done.returncode == 0


def test_fail_on(dataset: Path, tmp_path: Path) -> None:
    assert tracetool("replay", dataset, "--fail-on", "warn", cwd=tmp_path).returncode == 1
    assert tracetool("replay", dataset, "--fail-on", "never", cwd=tmp_path).returncode == 0
    assert tracetool("replay", dataset, "--fail-on", "loud", cwd=tmp_path).returncode == 2


def test_a_blind_system_is_inconclusive(dataset: Path, tmp_path: Path) -> None:
    done = tracetool("replay", dataset, "--system", "evtchn", "--json", cwd=tmp_path)
    assert done.returncode == 4
    assert json.loads(done.stdout)["runs"][0]["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"hello\nworld\n", "known format"), (bytes(70_000), "known format")],
    ids=["empty", "text", "zeros"],
)
def test_unreadable_input_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    done = tracetool("ingest", "bad", "-o", "d", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("tracetool: bad: offset 0: ")
    assert words in done.stderr
    assert not (tmp_path / "d").exists()
    assert leftovers(tmp_path) == []


def test_a_cut_file_keeps_its_good_part(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(SAMPLE.read_bytes()[:100_001])
    done = tracetool("ingest", "cut", "-o", "d", "--json", cwd=tmp_path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "offset" in done.stderr
    document = json.loads(done.stdout)
    assert document["bytes"]["total"] == 100_001
    assert document["bytes"]["parsed"] + document["bytes"]["skipped"] == 100_001
    assert document["gaps"]
    assert sum(document["records"].values()) > 4000
    assert tracetool("replay", "d", cwd=tmp_path).returncode == 3
    assert tracetool("replay", "cut", cwd=tmp_path).returncode == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["ingest"],
        ["replay", "nowhere"],
        ["replay", SAMPLE, "--policy", "nonsense"],
        ["replay", SAMPLE, "--set", "hpet.nonsense=1"],
        ["replay", SAMPLE, "--set", "hpet.slop_ns=soon"],
        ["ingest", SAMPLE, "-o", "d", "--cpu-hz", "fast"],
        ["ingest", SAMPLE, "-o", "d", "--format", "tape"],
        ["explain", "no-such-code"],
    ],
    ids=lambda a: "-".join(map(str, a))[-40:],
)
def test_usage_errors(arguments: list[str], tmp_path: Path) -> None:
    done = tracetool(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tracetool: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read: No such file or directory"), (b"hpet = \xff", "not a text file: byte 7 is not UTF-8")],
)
def test_a_bad_file_of_thresholds(
    content: bytes | None, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line that names the file once."""
    path = tmp_path / "thresholds.toml"
    if content is not None:
        path.write_bytes(content)
    assert run(["replay", str(SAMPLE), "--config", str(path)]) == 2
    assert capfd.readouterr() == ("", f"tracetool: {path}: {said}\n")


def test_missing_input(tmp_path: Path) -> None:
    done = tracetool("ingest", "nowhere", "-o", "d", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1


def test_an_existing_folder_is_not_overwritten(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert tracetool("ingest", SAMPLE, "-o", "mine", "--force", cwd=tmp_path).returncode == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert tracetool("ingest", SAMPLE, "-o", dataset, cwd=tmp_path).returncode == 2
    assert tracetool("ingest", SAMPLE, "-o", dataset, "--force", cwd=tmp_path).returncode == 0


def test_stdin(tmp_path: Path) -> None:
    done = tracetool("ingest", "-", "-o", "d", "--json", cwd=tmp_path, stdin=SAMPLE.read_bytes())
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout)["records"].values()) == 8993


def test_cpu_hz_replaces_what_is_derived(tmp_path: Path) -> None:
    done = tracetool("ingest", SAMPLE, "-o", "d", "--cpu-hz", "1.0G", "--json", cwd=tmp_path)
    clock = json.loads(done.stdout)["clock"]
    assert clock["hz"] == 1e9
    assert "--cpu-hz" in clock["origin"]


def test_thresholds_from_the_command_line_and_a_file(dataset: Path, tmp_path: Path) -> None:
    def late(*arguments: str) -> int:
        done = tracetool("replay", dataset, "--json", *arguments, cwd=tmp_path)
        return sum(f["code"] == "hpet-late-wakeup" for f in json.loads(done.stdout)["runs"][0]["findings"])

    usual = late()
    assert late("--set", "hpet.slop_ns=100000000") < usual
    (tmp_path / "tracetool.toml").write_text("[hpet]\nslop_ns = 100_000_000\n")
    assert late() < usual


def test_explain(tmp_path: Path) -> None:
    text = tracetool("explain", "hpet-wrong-cpu", cwd=tmp_path).stdout
    assert "migration" in text
    assert "A6" in text


def test_selftest(tmp_path: Path) -> None:
    done = tracetool("selftest", cwd=tmp_path)
    assert done.returncode == 0
    assert "116 of 116" in done.stdout


@pytest.mark.parametrize("delay_ms", [80, 160, 240, 320, 400, 480, 560, 700])
def test_killed_ingest_leaves_no_half_dataset(tmp_path: Path, delay_ms: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tracetool", "ingest", str(SAMPLE), "-o", "d"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(delay_ms / 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "d").exists():
        assert tracetool("info", "d", cwd=tmp_path).returncode == 0
    done = tracetool("ingest", SAMPLE, "-o", "d", "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert leftovers(tmp_path) == []


def test_ctrl_c_leaves_no_debris(tmp_path: Path) -> None:
    big = shared_path("recordings/xen-hvm-intx/boot.xentrace.zst")
    process = subprocess.Popen(
        [sys.executable, "-m", "tracetool", "ingest", str(big), "-o", "d"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    begun = time.monotonic()
    while not any(tmp_path.iterdir()) and time.monotonic() < begun + 60:  # on a busy machine it takes a while to start
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
