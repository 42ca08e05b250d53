"""However much was found, a report can be attached: at most 5 MB, with every finding and gap in its sums."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.report import build
from tests.report.browser import Browser
from tracetool.report import html, stories
from tracetool.report.figures import MARKS, finding_traces, gap_bars, merge_gaps
from tracetool.report.limits import LADDER, MAX_BYTES
from tracetool.report.words import Times
from tracetool.store import Dataset

MANY = 100_000


def many(data: Dataset, run: dict[str, Any], shape: str) -> None:
    """100,000 findings: few long episodes, or each its own, or all with long strings."""
    end = data.manifest["span"]["t1_ns"]
    run["findings"] = sorted((build.scattered(i, end, 8) for i in range(MANY)), key=lambda f: f["t_ns"])
    severities = ["error", "warn", "info"]
    for i, finding in enumerate(run["findings"]):
        finding["episode"] = i + 1 if shape != "few" else finding["cpu"] * 3 + severities.index(finding["severity"]) + 1
        if shape == "long":
            finding["expected"] = finding["observed"] = "<é&\"'" * 1500


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["few", "each", "long"])
def test_100_000_findings(tmp_path: Path, shape: str) -> None:
    data, runs = build.busy(tmp_path / "data")
    many(data, runs[0], shape)
    page = tmp_path / "report.html"
    page.write_text(html.render(data, runs), encoding="utf-8")
    assert page.stat().st_size <= MAX_BYTES
    with Browser() as browser:
        tab = browser.page()
        tab.resize(1280)
        began = time.monotonic()
        tab.load(page)
        assert tab.logged() == [] and tab.requests() == [] and tab.overflow() == []
        # Not a measurement: a page that takes a minute is no longer a page.
        assert time.monotonic() - began < 60


def test_no_finding_is_left_out_of_the_marks() -> None:
    """Even where every severity is on each of 80 lanes."""
    end = 10**10
    marks = [
        (f"CPU {i % 80}", {**build.scattered(i, end, 80), "severity": ("error", "warn", "info")[i // 80 % 3]}, "")
        for i in range(20_000)
    ]
    traces = finding_traces(marks, 0, 1, end, Times())
    hover = [text for trace in traces for text in trace["hovertext"]]
    assert len(hover) <= MARKS
    counts = [re.search(r"at ([\d\u202f]+) findings,", text) for text in hover]
    assert sum(int(found[1].replace("\u202f", "")) if found else 1 for found in counts) == len(marks)


def test_no_gap_is_left_out_of_the_bars() -> None:
    end = 10**9
    gaps = [
        {"cpu": None if i % 7 == 0 else i % 8, "t0_ns": i * 50_000, "t1_ns": i * 50_000 + 40, "lost": 1, "reason": "x"}
        for i in range(20_000)
    ]
    gaps.append({"cpu": 1, "t0_ns": None, "t1_ns": None, "lost": 5, "reason": "no time at all"})
    kept = merge_gaps(gaps, 0, end, 10)
    assert len(kept) * 10 <= MARKS and sum(g["lost"] for g in kept) == 20_000
    for gap in gaps[:-1]:
        assert any(k["cpu"] == gap["cpu"] and k["t0_ns"] <= gap["t0_ns"] and gap["t1_ns"] <= k["t1_ns"] for k in kept)
    assert merge_gaps(gaps[:50], 0, end, 10) == gaps[:50]
    lanes = [f"CPU {i}" for i in range(8)]
    assert len(gap_bars(gaps, lanes, 0, end, 0, 1, Times())) <= MARKS


def test_long_strings_are_cut_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, runs = build.busy(tmp_path / "data", cycles=100, findings=500)
    for i, finding in enumerate(runs[0]["findings"]):
        finding["episode"] = i // 2 + 1
        finding["expected"] = finding["observed"] = "<é&\"'" * 1500
    assert len(html.render(data, runs).encode()) <= MAX_BYTES
    monkeypatch.setattr(html, "LADDER", LADDER[:1])
    assert len(html.render(data, runs).encode()) > MAX_BYTES  # so it was the ladder that did it


def test_episodes_beyond_the_list_are_summed_up(tmp_path: Path) -> None:
    data, runs = build.busy(tmp_path / "data", cycles=100, findings=1500)
    told = stories.stories(runs, Times())
    page = html.render(data, runs)
    table = page[page.index("All other episodes, summed up") :].partition("</table>")[0]
    numbers = [re.findall(r'<td class="n">([\d\u202f]+)</td>', row) for row in table.split("<tr>")[1:]]
    sums = [sum(int(row[i].replace("\u202f", "")) for row in numbers if row) for i in (0, 1)]
    beyond = told[LADDER[0].stories + LADDER[0].listed :]
    assert sums == [len(beyond), sum(len(s.findings) for s in beyond)]
