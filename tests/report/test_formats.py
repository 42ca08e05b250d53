"""Text, Markdown, JUnit, console and the static side of the HTML report."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from parsers.recording import Gap
from replay.coverage import coverage
from replay.systems import SYSTEMS
from tests.report import build
from tracetool.replaying import not_replayed
from tracetool.report import console, html, junit, markdown, stories, text, verdict
from tracetool.report.recorded import Gaps
from tracetool.report.vendor import PLOTLYJS_VERSION, plotlyjs
from tracetool.report.words import Times, clean
from tracetool.results import verdict as judged
from tracetool.store import Dataset

Made = tuple[Dataset, list[dict[str, Any]]]

TYPICAL = 2_500_000
LIMIT = 5_000_000


@pytest.fixture(scope="module")
def handover(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return build.handover(tmp_path_factory.mktemp("handover") / "data")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return build.hostile(tmp_path_factory.mktemp("hostile") / "data")


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return build.busy(tmp_path_factory.mktemp("busy") / "data")


def controls(document: str, allowed: str = "\n") -> set[str]:
    """Characters that control a terminal or the order of letters."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return {c for c in set(document) if unicodedata.category(c) in hidden and c not in allowed}


class Reader(HTMLParser):
    """Elements, attributes and text of a document; scripts and styles apart."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.text.append(data)


# -- all of them say the same ------------------------------------------------------------------------------------


def test_every_format_tells_the_worst_finding(handover: Made) -> None:
    data, runs = handover
    documents = {
        "html": html.render(data, runs),
        "text": re.sub(r"\s+", " ", text.render(runs, data.manifest)),
        "markdown": markdown.render(runs, data.manifest),
        "junit": junit.render(runs, data.manifest),
        "console": str(console.render(runs, data.manifest)),
    }
    for name, document in documents.items():
        for needle in ("hpet-wrong-cpu", "interrupt on cpu 0", "handler on cpu 1", "0.000801000 s"):
            assert needle in document, (name, needle)


def test_worst_first_and_folded(handover: Made) -> None:
    _, runs = handover
    told = stories.stories(runs, Times())
    assert [s.severity for s in told] == sorted((s.severity for s in told), key=["error", "warn", "info"].index)
    assert told[0].first["code"] == "hpet-wrong-cpu"
    assert len(told[0].findings) == 2
    assert all(not s.predicted for s in told)


def test_blind_is_never_clean(handover: Made) -> None:
    data, runs = handover
    system = SYSTEMS["hpet"]
    blind = coverage(system, {})
    assert judged([], blind, 0.0) == "inconclusive"
    run = {
        **runs[0], "findings": [], "verdict": "inconclusive",
        "coverage": [{"rule": c.rule, "state": c.state, "reason": c.reason} for c in blind],
    }  # fmt: skip
    page = html.render(data, [run])
    assert "b-clean" not in Reader(page).text and 'class="badge b-clean"' not in page
    assert 'class="badge b-checked"' not in page
    others = not_replayed([run], data.manifest)
    assert set(others) == set(SYSTEMS) - {"hpet"}
    assert page.count("cannot tell") == len(system.codes) + sum(map(len, others.values()))
    assert "not a clean bill" in page
    plain = text.render([run], data.manifest)
    assert plain.startswith("Inconclusive")
    assert plain.count("BLIND") == len(system.codes) + len(others)
    suite, *unlooked = ET.fromstring(junit.render([run], data.manifest))
    assert len(suite.findall("testcase/skipped")) == len(system.codes)
    assert [len(s.findall("testcase/skipped")) for s in unlooked] == [len(rules) for rules in others.values()]
    every = {c.rule for rules in others.values() for c in rules} | {code.name for code in system.codes}
    for words in (page, plain, markdown.render([run], data.manifest), junit.render([run], data.manifest)):
        assert [name for name in every if name not in words] == []
    assert "clean" not in str(console.render([run], data.manifest)).replace("not a clean bill", "")


def test_nothing_replayed_is_not_clean(handover: Made) -> None:
    data, _ = handover
    assert "nothing is known" in html.render(data, [])
    assert verdict.overall([]) == "inconclusive"


def test_a_clean_verdict_names_what_was_blind(handover: Made) -> None:
    data, runs = handover
    run = {**runs[0], "findings": [], "verdict": "clean"}
    line = text.render([run], data.manifest, 400).splitlines()[0]
    assert line.startswith("Clean as far as can be seen") and "2 of 16 rules could not be checked" in line


def test_horizon_parts_evidence_from_prediction(handover: Made) -> None:
    _, runs = handover
    told = {s.first["code"]: s for s in stories.stories(runs, Times())}
    before, after = told["hpet-affinity-stale"], told["hpet-wrong-cpu"]
    assert before.first["t_ns"] <= runs[1]["horizon_ns"] < after.first["t_ns"]
    assert all(o.evidence.startswith("evidence until") for o in before.others)
    assert all(o.evidence.startswith("prediction only") for o in after.others)
    runs_without = [runs[0], {**runs[1], "calibration": None, "horizon_ns": None}]
    assert "not calibrated" in stories.stories(runs_without, Times())[0].others[0].evidence


@pytest.mark.parametrize(
    ("t", "cpu", "says"),
    [
        (100, 2, "inside a gap"),
        (50, 2, "50 ns later"),
        (250, 2, "50 ns earlier"),
        (100, 1, "none on CPU 1; elsewhere inside a gap"),
        (100, None, "inside a gap"),
    ],
)
def test_nearest_gap(t: int, cpu: int | None, says: str) -> None:
    gaps = [{"cpu": 2, "t0_ns": 100, "t1_ns": 200, "reason": "lost-records", "lost": 3}]
    assert Gaps(gaps).nearest(t, cpu, Times()).startswith(says)


def test_an_open_gap_covers_the_rest() -> None:
    gaps = [{"cpu": None, "t0_ns": 100, "t1_ns": None, "reason": "truncated", "lost": None}]
    assert Gaps(gaps).nearest(10**12, 3, Times()).startswith("inside a gap")


def test_others_look_at_the_stretch_of_the_episode(handover: Made) -> None:
    _, runs = handover
    late = {**runs[0]["findings"][-1], "code": "hpet-early-wakeup", "t_ns": 10**12}
    other = {**runs[1], "findings": [*runs[1]["findings"], late], "horizon_ns": 801_000}
    story = next(s for s in stories.stories([runs[0], other], Times()) if s.first["code"] == "hpet-wrong-cpu")
    assert "near it 2 × hpet-early-wakeup" in story.others[0].says
    assert story.others[0].evidence.endswith("1 of the 2 occurrences")


def test_uncalibrated_is_no_evidence(handover: Made) -> None:
    _, runs = handover
    calibration = {"state": "uncalibrated", "tolerance": 0.25, "metrics": {"hpet_irqs": [100, 7]}}
    other = {**runs[1], "calibration": calibration, "horizon_ns": 10**9}
    said = verdict.reliable(other, 0, Times())
    assert said == "not evidence, uncalibrated (hpet irqs recorded 100, predicted 7); horizon 1.000000000 s"
    assert stories.stories([runs[0], other], Times())[0].others[0].evidence.startswith("not evidence, uncal")


# -- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["handover", "hostile", "busy"])
@pytest.mark.parametrize("width", [72, 60])
def test_text_keeps_its_width(kind: str, width: int, request: pytest.FixtureRequest) -> None:
    data, runs = request.getfixturevalue(kind)
    document = text.render(runs, data.manifest, width, gaps=data.gaps())
    assert max(len(line) for line in document.splitlines()) <= width
    assert not controls(document)


def test_ticks_are_not_called_seconds(handover: Made) -> None:
    data, runs = handover
    manifest = {**data.manifest, "clock": {"kind": "tsc", "hz": None, "unit": "ticks"}}
    document = text.render(runs, manifest)
    assert "801 000 ticks" in document and " s\n" not in document and "µs" not in document


# -- hostile strings ---------------------------------------------------------------------------------------------


def test_hostile_strings_control_nothing(hostile: Made) -> None:
    data, runs = hostile
    sink = io.StringIO()
    # Every finding as if it were the first of its code: the summary shows no other.
    for index in range(len(runs[0]["findings"])):
        shown = console.render([{**runs[0], "findings": runs[0]["findings"][index:]}], data.manifest)
        Console(file=sink, force_terminal=False, width=400, highlight=False).print(shown)
        assert not controls(str(shown)) and not controls(sink.getvalue())
    assert "[bold red]markup[/bold red]" in sink.getvalue()
    for story in stories.stories(runs, Times()):
        Console(file=sink, width=100).print(console.story(story, Times()))
    assert not controls(sink.getvalue())
    # U+2060 keeps Markdown from making links and lists.
    assert not controls(markdown.render(runs, data.manifest), "\n\u2060")
    parsed = ET.fromstring(junit.render(runs, data.manifest))
    assert any("\\x1b[31m" in (f.text or "") for f in [*parsed.iter("failure"), *parsed.iter("system-out")])


def test_markdown_has_no_html_but_its_own(hostile: Made) -> None:
    data, runs = hostile
    document = markdown.render(runs, data.manifest, gaps=data.gaps())
    outside = re.sub(r"`[^`\n]*`", "", document)
    tags = set(re.findall(r"(?<!\\)<[^>\n]*>", outside))
    assert tags <= {"<details>", "</details>", "<summary>", "</summary>"}
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith("| ")]
    assert widths and max(widths) <= 6


def test_hostile_strings_are_text_in_html(hostile: Made) -> None:
    data, runs = hostile
    page = html.render(data, runs, command=build.HOSTILE[0])
    own = page.replace(plotlyjs(), "")
    assert not controls(own)
    seen = Reader(own)
    shown = "".join(seen.text)
    for bad in build.HOSTILE:
        assert clean(bad) in shown
    assert [t for t, _ in seen.elements].count("script") == 3
    assert "img" not in [t for t, _ in seen.elements]
    for tag, attributes in seen.elements:
        assert not [a for a in attributes if a.startswith("on")], (tag, attributes)


# -- the document --------------------------------------------------------------------------------------------------


def test_nothing_refers_to_a_network(handover: Made) -> None:
    data, runs = handover
    page = html.render(data, runs)
    for tag, attributes in Reader(page).elements:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for t, a in Reader(page).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy and "unsafe-inline'; img" in policy and "unsafe-eval" not in policy
    assert re.search(r"script-src 'sha256-\S+' 'sha256-\S+';", policy)


def test_same_input_same_bytes(handover: Made) -> None:
    data, runs = handover
    assert html.render(data, runs) == html.render(Dataset.open(data.path), json.loads(json.dumps(runs)))
    assert text.render(runs, data.manifest) == text.render(json.loads(json.dumps(runs)), data.manifest)


@pytest.mark.parametrize(("findings", "limit"), [(300, TYPICAL), (30_000, LIMIT)])
def test_size(tmp_path: Path, findings: int, limit: int) -> None:
    data, runs = build.busy(tmp_path / "data", findings=findings)
    page = html.render(data, runs)
    assert 1_300_000 < len(page.encode()) <= limit


def test_every_finding_and_gap_is_drawn(tmp_path: Path) -> None:
    data, runs = build.busy(tmp_path / "data", findings=9000)
    runs[0]["findings"][5]["t_ns"] += 1
    figures = _figures(html.render(data, runs))
    overview = figures["overview"]["data"]
    marks = [t for t in overview if t.get("name") in ("error", "warning", "remark")]
    drawn = 0
    for trace in marks:
        for hover in trace["hovertext"]:
            many = re.search(r" at ([\d\u202f]+) findings", hover)
            drawn += int(many[1].replace("\u202f", "")) if many else 1
    assert drawn == 9000
    gaps = next(t for t in overview if t.get("name") == "no records")
    lanes = len(figures["overview"]["layout"]["yaxis"]["ticktext"])
    assert len(gaps["x"]) >= lanes + 1  # one covers every lane, one a CPU
    assert min(gaps["x"]) > 0


def test_a_gap_in_the_window_is_drawn_over_the_lanes(tmp_path: Path) -> None:
    data, runs = build.handover(tmp_path / "data")
    gap = Gap("lost-records", None, 600_000, 700_000, 0, 0, 5)
    events = data.events().collect().to_dicts()
    again = build.dataset(
        tmp_path / "gap",
        [{"t": e["t_ns"], **{k: e[k] for k in ("kind", "cpu", "obj", "tgt", "val", "flags")}} for e in events],
        manifest=build.MANIFEST,
        gaps=[gap],
    )
    figure = _figures(html.render(again, runs))["story-1"]
    hatched = next(t for t in figure["data"] if t["name"] == "no records")
    assert set(figure["layout"]["yaxis"]["categoryarray"]) == set(hatched["y"])


def test_a_period_without_an_end_stops_at_a_gap(tmp_path: Path) -> None:
    us = 1000
    events: list[dict[str, Any]] = [
        {"t": 0, "kind": "idle.enter", "cpu": 0, "val": 0},
        *({"t": i * 50 * us, "kind": "idle.enter" if i % 2 else "idle.exit", "cpu": 1, "val": 0} for i in range(1, 40)),
    ]
    gap = Gap("lost-records", None, 500 * us, 600 * us, 0, 0, 5)
    data = build.dataset(tmp_path / "data", events, gaps=[gap])
    run = build.verify(data)
    finding = {**build.scattered(0, 10**6, 1), "t_ns": 700 * us, "cpu": 0, "evidence": []}
    page = html.render(data, [{**run, "findings": [finding], "verdict": "findings"}])
    idle = next(t for t in _figures(page)["story-1"]["data"] if t["name"] == "idle")
    ends = [b + w for lane, b, w in zip(idle["y"], idle["base"], idle["x"], strict=True) if lane == "CPU 0"]
    assert ends == [pytest.approx(500 - 700)]


def test_charts_are_valid_figures(handover: Made, busy: Made) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for data, runs in (handover, busy):
        for figure in _figures(html.render(data, runs)).values():
            graph_objects.Figure(_coloured(figure))


def test_vendored_bundle_is_what_it_says() -> None:
    assert f"v{PLOTLYJS_VERSION}" in plotlyjs()[:200]
    assert "</script" not in plotlyjs().lower()


def test_a_manifest_may_say_nothing(tmp_path: Path) -> None:
    data = build.dataset(tmp_path / "data", [], manifest={})
    page = html.render(data, [])
    assert "does not say which files" in page and "nothing is known about it" in page
    assert text.render([], data.manifest)


def _figures(page: str) -> dict[str, Any]:
    start = page.index('id="figures">') + len('id="figures">')
    figures: dict[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return figures


def _coloured(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _coloured(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_coloured(v) for v in value]
    return "#000000" if isinstance(value, str) and value.startswith("--") else value
