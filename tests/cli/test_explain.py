"""`tracetool explain DATASET FINDING`: the story, its evidence in Python, colour on a terminal only."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.small import ESCAPES, SAMPLE, hostile_dataset, sample_dataset
from tests.cli.test_commands import tracetool
from tracetool import story
from tracetool.query import findings_frame
from tracetool.replaying import Settings, choose, replay_dataset
from tracetool.store import Dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return sample_dataset(tmp_path_factory.mktemp("explain") / "d")


def on_a_terminal(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """What the tool writes to a terminal."""
    main, worker = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tracetool", *map(str, arguments)], stdout=worker, stderr=worker, stdin=worker, cwd=cwd,
        env={**clean, "TERM": "xterm-256color", "XDG_CACHE_HOME": str(cwd / "cache"), **environment},
    )  # fmt: skip
    os.close(worker)
    out = b""
    while select.select([main], [], [], 60)[0]:
        try:
            data = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        out += data
    os.close(main)
    assert process.wait(60) == 0
    return out.decode()


def test_the_listing_names_every_episode(dataset: Dataset, tmp_path: Path) -> None:
    runs = replay_dataset(dataset, Settings())
    done = tracetool("explain", dataset.path, cwd=tmp_path)
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert sorted(listed) == sorted(set(findings_frame(runs)["id"].to_list()))
    assert len(listed) == len(set(listed))
    document = json.loads(tracetool("explain", dataset.path, "--json", cwd=tmp_path).stdout)
    assert [f["finding"] for f in document["findings"]] == listed
    assert sum(f["occurrences"] for f in document["findings"]) == len(runs[0]["findings"])


def test_the_story(dataset: Dataset, tmp_path: Path) -> None:
    text = tracetool("explain", dataset.path, "hpet-wrong-cpu", cwd=tmp_path).stdout
    wrong = next(f for f in replay_dataset(dataset, Settings())[0]["findings"] if f["code"] == "hpet-wrong-cpu")
    for words in (
        wrong["expected"], wrong["observed"], f"{wrong['offset']:#x}", "cause", "confidence", "gap",
        "proposed (what-if)", "the recording is evidence until", *(e["label"] for e in wrong["evidence"]),
    ):  # fmt: skip
        assert words in text
    assert max(map(len, text.splitlines())) <= 100
    by_id = tracetool("explain", dataset.path, f"hpet:current:{wrong['episode']}", cwd=tmp_path).stdout
    assert by_id == text


def test_a_recording_will_do(tmp_path: Path) -> None:
    assert "handler on cpu" in tracetool("explain", SAMPLE, "hpet-wrong-cpu", cwd=tmp_path).stdout


def test_json(dataset: Dataset, tmp_path: Path) -> None:
    document = json.loads(tracetool("explain", dataset.path, "hpet-wrong-cpu", "--json", cwd=tmp_path).stdout)
    first = document["first"]
    assert document["finding"].startswith("hpet:current:")
    assert [e["dt_ns"] for e in document["events"]] == [e["t_ns"] - first["t_ns"] for e in first["evidence"]]
    assert [o["policy"] for o in document["other_policies"]] == ["proposed"]
    assert document["cause"]


def test_python_lines_show_exactly_the_evidence(dataset: Dataset) -> None:
    """Every finding's lines run as they are, and find what the finding says."""
    runs = replay_dataset(dataset, Settings(policies=(choose("current"), choose("proposed"))))
    names = findings_frame(runs).group_by("policy", "code", maintain_order=True).first()["id"].to_list()
    assert len(names) >= 6
    recorded = 0
    for name in names:
        chosen = story.find(dataset, name)
        names_: dict[str, Any] = {}
        exec("\n".join(story.python_lines(dataset, chosen)), names_)
        evidence = names_["evidence"]
        want = {(e["seq"], e["t_ns"], e["offset"]) for e in chosen.first["evidence"] if e["seq"] is not None}
        if want:
            recorded += 1
            assert set(evidence.select("seq", "t_ns", "offset").rows()) == want, name
            # A handler's record is written at its end: the place is the same, the moment need not be.
            places = {offset for frame in names_["records"].values() for offset in frame["offset"]}
            assert {offset for _, _, offset in want} <= places, name
        else:
            assert (evidence["t_ns"] <= chosen.first["t_ns"]).all()
            assert set(evidence["cpu"].to_list()) <= {chosen.first["cpu"], None}
    assert recorded >= 4


def test_the_printed_lines_are_a_program(dataset: Dataset, tmp_path: Path) -> None:
    done = tracetool("explain", dataset.path, "hpet-wrong-cpu", "--show-python", cwd=tmp_path)
    (tmp_path / "lines.py").write_text(done.stdout)
    ran = subprocess.run([sys.executable, "lines.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "TRC_HW_IRQ_HANDLED" in ran.stdout


def test_colour_on_a_terminal_only(dataset: Dataset, tmp_path: Path) -> None:
    piped = tracetool("explain", dataset.path, "hpet-wrong-cpu", cwd=tmp_path).stdout
    coloured = on_a_terminal("explain", dataset.path, "hpet-wrong-cpu", cwd=tmp_path)
    plain = on_a_terminal("explain", dataset.path, "hpet-wrong-cpu", cwd=tmp_path, NO_COLOR="1")
    assert "\x1b" not in piped
    assert "\x1b[" in coloured
    assert "\x1b[3" not in plain
    assert "handler on cpu 3" in plain


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-code"], "did you mean"),
        (["nowhere/at/all", "hpet-wrong-cpu"], "no such file"),
        (["D", "hpet:current:9999"], "tracetool explain DATASET"),
        (["D", "no-such-code"], "tracetool explain DATASET"),
        (["D", "hpet:moon:1"], "policy"),
        (["hpet-wrong-cpu", "--show-python"], "--show-python"),
    ],
)
def test_mistakes_say_what_to_do(dataset: Dataset, arguments: list[str], words: str, tmp_path: Path) -> None:
    done = tracetool("explain", *(dataset.path if a == "D" else a for a in arguments), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


@pytest.mark.parametrize("options", [[], ["--json"], ["--show-python"]], ids=str)
def test_hostile_names_control_nothing(tmp_path: Path, options: list[str]) -> None:
    dataset = hostile_dataset(tmp_path / f"d'{ESCAPES.translate({ord(c): None for c in '/[]'})}")
    runs = replay_dataset(dataset, Settings(systems=("hpet",), values={"hpet": {"slop_ns": 1}}))
    assert runs[0]["findings"], "the hostile dataset is meant to have a finding"
    name = findings_frame(runs)["id"][0]
    arguments = ["explain", dataset.path, name, "--set", "hpet.slop_ns=1", *options]
    done = tracetool(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + ("" if options else on_a_terminal(*arguments, cwd=tmp_path, NO_COLOR="1", TERM="dumb"))
    assert not set(shown) & (set(ESCAPES) - {"\x1b"}) - set(map(chr, range(32, 127)))
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    if "--show-python" in options:
        exec(done.stdout, {"print": lambda *_: None})
