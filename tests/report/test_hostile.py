"""Strings that a guest chose say nothing but themselves, in every form of the report and in every table of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.report import build
from tests.report.test_formats import Reader, controls
from tracetool.report import html, junit, markdown, text
from tracetool.report.tables import Table, tables
from tracetool.report.vendor import plotlyjs
from tracetool.report.words import Times, clean
from tracetool.report.write import findings_json
from tracetool.store import Dataset

Made = tuple[Dataset, list[dict[str, Any]], list[Table]]
HARMLESS = tuple(f"harmless {i}" for i in range(len(build.HOSTILE)))


def made(path: Path, strings: tuple[str, ...]) -> Made:
    data, runs = build.hostile(path, strings)
    rows = tuple((s, 1, s) for s in strings)
    shown = tuple((s, "1", s) for s in strings)
    # As the tables of channels and of the budget would be, if a string of a guest came into them.
    budget = Table("budget", strings[0], strings[1], (strings[2], "share", strings[3]), rows, shown, frozenset({1}), 1)
    return data, runs, [*tables(data, runs, Times()), budget]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("hostile") / "data", build.HOSTILE)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("harmless") / "data", HARMLESS)


def test_the_strings_are_everywhere(harmless: Made) -> None:
    """Else the other tests would prove little."""
    data, runs, beside = harmless
    assert {t.name.rpartition(":")[2] for t in beside} >= {"budget", *HARMLESS}
    for document, least in (
        (html.render(data, runs, command=HARMLESS[0], beside=beside), 300),
        (markdown.render(runs, data.manifest, gaps=data.gaps(), beside=beside), 150),
        (text.render(runs, data.manifest, gaps=data.gaps(), beside=beside), 150),
    ):
        assert document.count("harmless") > least
        for string in HARMLESS:
            assert string in " ".join(document.split())


def test_nothing_controls_or_reorders(hostile: Made) -> None:
    data, runs, beside = hostile
    assert not controls(html.render(data, runs, command=build.HOSTILE[0], beside=beside).replace(plotlyjs(), ""))
    assert not controls(markdown.render(runs, data.manifest, gaps=data.gaps(), beside=beside), "\n\u2060")
    plain = text.render(runs, data.manifest, gaps=data.gaps(), beside=beside)
    assert not controls(plain) and max(map(len, plain.splitlines())) <= 72


def test_html_has_the_elements_of_a_harmless_report(hostile: Made, harmless: Made) -> None:
    def skeleton(one: Made, command: str) -> list[tuple[str, tuple[str, ...]]]:
        data, runs, beside = one
        page = html.render(data, runs, command=command, beside=beside)
        return [(tag, tuple(attributes)) for tag, attributes in Reader(page).elements]

    assert skeleton(hostile, build.HOSTILE[1]) == skeleton(harmless, HARMLESS[1])


def test_markdown_has_the_structure_of_a_harmless_report(hostile: Made, harmless: Made) -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])

    def skeleton(one: Made) -> list[str]:
        data, runs, beside = one
        found = []
        for token in parser.parse(markdown.render(runs, data.manifest, gaps=data.gaps(), beside=beside)):
            found.append(f"{token.type} {token.tag}")
            found += [child.type for child in token.children or () if child.type != "text_special"]
        return found

    def structure(tokens: list[str]) -> list[str]:
        return [t for t in tokens if t != "text"]

    evil, good = skeleton(hostile), skeleton(harmless)
    assert structure(evil) == structure(good)
    assert not {"link_open", "image", "html_inline", "s_open"} & set(evil)
    assert parser.parse("[a](b) ![c](d) <b>")[1].children[0].type == "link_open"  # the parser sees what it should


def test_markdown_mentions_nobody(hostile: Made) -> None:
    data, runs, beside = hostile
    document = markdown.render(runs, data.manifest, gaps=data.gaps(), beside=beside)
    said = re.sub(r"(?<!\\)`[^`]*`", "", document)  # what is code is left alone
    for linked in ("@someone", "#1", "GH-2", "me@e.example", "https://", "www.e"):
        assert linked not in said
        assert linked not in said.replace("\\", "")


def test_xml_and_json_are_valid_and_whole(hostile: Made) -> None:
    data, runs, beside = hostile
    document = junit.render(runs, data.manifest)
    assert not controls(document)
    ET.fromstring(document.encode("utf-8"))
    loaded = json.loads(findings_json(data, runs, beside))
    assert [f["observed"] for f in loaded["runs"][0]["findings"]] == list(build.HOSTILE)
    assert all(clean(b) for b in build.HOSTILE)
