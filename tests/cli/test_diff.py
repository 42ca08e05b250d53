"""`tracetool diff`: what is new, gone, changed, and what nobody can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from replay.declare import UsageError
from tests.cli.small import ESCAPES, sample_dataset
from tests.cli.test_commands import tracetool
from tracetool.difference import compare, exit_code, stored, text
from tracetool.store import Dataset


def finding(code: str = "hpet-wrong-cpu", severity: str = "error", **place: int) -> dict[str, Any]:
    return {"code": code, "severity": severity, "t_ns": 1, "cpu": None, "dom": None, "vcpu": None, "obj": None, **place}


def side(
    *findings: dict[str, Any], blind: tuple[str, ...] = (), policy: str = "current", **more: Any
) -> dict[str, Any]:
    rules = {f["code"] for f in findings} | set(blind) | {"hpet-wrong-cpu", "hpet-nested-irq"}
    run = {
        "system": "hpet", "policy": policy, "mode": "verify", "verdict": "findings" if findings else "clean",
        "findings": list(findings), "metrics": {"sleeps": len(findings), "same": 1},
        "coverage": [{"rule": r, "state": "blind" if r in blind else "checked"} for r in sorted(rules)], **more,
    }  # fmt: skip
    return {"name": "x", "runs": [run], "unit": "ns"}


def test_new_gone_changed_and_the_same() -> None:
    a = side(finding(obj=0), finding(obj=1), finding(obj=1), finding(obj=3))
    b = side(finding(obj=1), finding(obj=2, cpu=7), finding(obj=3))
    found = compare(a, b)
    assert [(r["object"], r["a"], r["b"]) for r in found["new"]] == [({"obj": 2}, 0, 1)]
    assert [(r["object"], r["a"], r["b"]) for r in found["gone"]] == [({"obj": 0}, 1, 0)]
    assert [(r["object"], r["a"], r["b"]) for r in found["changed"]] == [({"obj": 1}, 2, 1)]
    assert found["same"] == 1
    assert found["metrics"] == [
        {"system": "hpet", "policy": "current", "metric": "sleeps", "a": 4, "b": 3, "delta": -1}
    ]


def test_the_other_way_round_new_is_gone() -> None:
    a, b = side(finding(obj=0), finding(obj=1)), side(finding(obj=1), finding(obj=2), finding(vcpu=3, dom=1))
    there, back = compare(a, b), compare(b, a)
    for one, two in (("new", "gone"), ("gone", "new"), ("changed", "changed")):
        assert [(r["code"], r["object"], r["a"], r["b"]) for r in there[one]] == [
            (r["code"], r["object"], r["b"], r["a"]) for r in back[two]
        ]


def test_the_cpu_where_it_was_noticed_is_no_difference() -> None:
    assert compare(side(finding(obj=0, cpu=1)), side(finding(obj=0, cpu=2)))["same"] == 1
    assert compare(side(finding(cpu=1)), side(finding(cpu=2)))["same"] == 0


def test_severity_is_part_of_the_signature() -> None:
    found = compare(side(finding(obj=0, severity="warn")), side(finding(obj=0, severity="error")))
    assert [r["severity"] for r in found["new"]] == ["error"]
    assert [r["severity"] for r in found["gone"]] == ["warn"]


def test_what_a_blind_rule_does_not_show_is_not_gone() -> None:
    a, b = side(finding(obj=0)), side(blind=("hpet-wrong-cpu",))
    found = compare(a, b)
    assert found["gone"] == []
    assert [r["reason"] for r in found["untold"]] == ["the rule is blind"]
    assert exit_code(found, "error") == 4
    # Nor is it new if it could not have been seen before.
    found = compare(b, a)
    assert found["new"] == []
    assert exit_code(found, "error") == 4


def test_a_policy_that_only_one_side_ran_is_not_compared() -> None:
    found = compare(side(finding(obj=0)), side(policy="proposed"))
    assert [r["reason"] for r in found["untold"]] == ["hpet was not replayed under current"]
    assert exit_code(found, "error") == 4


@pytest.mark.parametrize(
    ("severity", "fail_on", "code"),
    [("error", "error", 1), ("warn", "error", 0), ("warn", "warn", 1), ("info", "info", 1), ("error", "never", 0)],
)
def test_exit_code(severity: str, fail_on: str, code: int) -> None:
    found = compare(side(), side(finding(severity=severity, obj=0)))
    assert exit_code(found, fail_on) == code


def test_changed_counts_alone_are_no_failure() -> None:
    assert exit_code(compare(side(finding(obj=0)), side(finding(obj=0), finding(obj=0))), "info") == 0


def test_different_settings_are_said() -> None:
    a, b = (side(config={"slop_ns": {"value": v}}) for v in (1, 2))
    assert "hpet.slop_ns 1 -> 2" in text(compare(a, b))


@pytest.mark.parametrize(
    "content",
    [
        '{"schema": 2, "runs": []}', '{"schema": 1, "runs": 7}', '{"schema": 1, "runs": [{}]}',
        '{"schema": 1, "runs": [{"system": "a", "policy": "b", "mode": "", "verdict": "", "metrics": {},'
        ' "findings": [{"code": "x", "severity": "loud"}]}]}',
    ],
)  # fmt: skip
def test_other_json_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        stored(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_hostile_strings_are_spelled_out() -> None:
    a = side(policy="p" + ESCAPES)
    b = {**side(finding(code="c" + ESCAPES, obj=1)), "name": "n" + ESCAPES}
    assert not set(text(compare(a, b))) & set(ESCAPES) - set(map(chr, range(32, 127)))


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return sample_dataset(tmp_path_factory.mktemp("diff") / "d")


def test_a_recording_against_its_own_stored_replays(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(tracetool("replay", dataset.path, "--json", cwd=tmp_path).stdout)
    assert tracetool("report", dataset.path, "-p", "current", "-o", "report.json", cwd=tmp_path).returncode == 0
    for other in ("run.json", "report.json"):
        done = tracetool("diff", dataset.path, other, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert [found[k] for k in ("new", "gone", "changed", "untold", "metrics")] == [[]] * 5
        assert found["same"] > 10


def test_a_threshold_shows_as_a_difference(dataset: Dataset, tmp_path: Path) -> None:
    loose = tracetool("replay", dataset.path, "--json", "--set", "hpet.slop_ns=100000000", cwd=tmp_path).stdout
    (tmp_path / "loose.json").write_text(loose)
    done = tracetool("diff", "loose.json", dataset.path, "--fail-on", "warn", cwd=tmp_path)
    assert done.returncode == 1
    assert "new in B" in done.stdout
    assert "hpet-late-wakeup" in done.stdout
    assert tracetool("diff", dataset.path, "loose.json", "--fail-on", "warn", cwd=tmp_path).returncode == 0


def test_usage(dataset: Dataset, tmp_path: Path) -> None:
    for arguments in (["nowhere", dataset.path], [dataset.path], [dataset.path, dataset.path, "--fail-on", "x"]):
        done = tracetool("diff", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
