"""Writes a report in the form that the file's name asks for; it appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from replay.declare import UsageError
from tracetool.output import whole_files
from tracetool.report.recorded import times_of
from tracetool.report.tables import Table, document, tables
from tracetool.report.verdict import finding_id
from tracetool.store import Dataset

__all__ = ["SUFFIXES", "check_suffix", "findings_json", "write_report", "write_whole"]

Progress = Callable[[str, int, int], None]

SUFFIXES: Final = (".html", ".txt", ".md", ".json", ".xml")


def write_report(
    dataset: Dataset, runs: Sequence[Mapping[str, Any]], output: Path, *, command: str = "",
    progress: Progress | None = None,
) -> int:
    """Render the runs and write them to `output`; returns the size in bytes. UsageError for an unknown suffix.

    `progress` is called with what is done, and how many of how many stories are told (HTML).
    """
    check_suffix(output)
    text = _render(output.suffix.lower(), dataset, runs, command, progress)
    return write_whole(output, text)


def check_suffix(output: Path, *, bundle: bool = False) -> None:
    """UsageError unless a report, or a bundle of reports, is called what it is; better before minutes of work."""
    if bundle and output.suffix.lower() != ".zip":
        raise UsageError(f"{output}: a bundle ends in .zip")
    if not bundle and output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{output}: a report ends in one of {', '.join(SUFFIXES)}")


def _render(
    suffix: str, dataset: Dataset, runs: Sequence[Mapping[str, Any]], command: str,
    progress: Progress | None,
) -> str:
    if suffix == ".xml":
        from tracetool.report import junit

        return junit.render(runs, dataset.manifest)
    beside = tables(dataset, runs, times_of(dataset.manifest))
    if suffix == ".html":
        from tracetool.report import html

        return html.render(dataset, runs, command=command, beside=beside, progress=progress)
    if suffix == ".txt":
        from tracetool.report import text

        return text.render(runs, dataset.manifest, gaps=dataset.gaps(), beside=beside)
    if suffix == ".md":
        from tracetool.report import markdown

        return markdown.render(runs, dataset.manifest, gaps=dataset.gaps(), beside=beside)
    return findings_json(dataset, runs, beside)


def findings_json(dataset: Dataset, runs: Sequence[Mapping[str, Any]], beside: Sequence[Table]) -> str:
    """The whole of the run records with the manifest; each finding under the name that `explain` takes."""
    named = [
        {**run, "findings": [{"id": finding_id(run, f), **f} for f in run["findings"]]} for run in runs
    ]
    whole = {"schema": 1, "manifest": dataset.manifest, "runs": named, "tables": document(beside)}
    return json.dumps(whole, indent=1) + "\n"


def write_whole(output: Path, text: str) -> int:
    """Write beside and rename; StoreError when that is not possible."""
    data = text.encode("utf-8", "backslashreplace")
    with whole_files(output) as (staging,):
        staging.write_bytes(data)
    return len(data)
