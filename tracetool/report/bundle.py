"""One zip file to attach: the report in every form, and the records that prove its findings.

    report.html, report.txt, report.md   the report
    findings.json                        the same as `report -o findings.json`
    records/NN-<finding>/…               the records of that finding's window: cut out of the recording as they are,
                                         or, where that is not at hand, the rows of the dataset as CSV
    manifest.json                        what each file is, its SHA-256, the commands that make it again

Nothing else of the recording goes in. The same input gives the same bytes: names in order, no clock.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import polars as pl

from parsers.open import open_recording
from parsers.recording import RecordingError
from tracetool import __version__
from tracetool.output import whole_files
from tracetool.query import csv_text
from tracetool.report import html, markdown, recorded, stories, text, verdict
from tracetool.report.around import Events
from tracetool.report.cutting import SUFFIX, cut
from tracetool.report.stories import Story
from tracetool.report.tables import tables
from tracetool.report.window import STORIES, Records, records_of, view_of
from tracetool.report.words import clean
from tracetool.report.write import check_suffix, findings_json
from tracetool.store import Dataset, file_name

__all__ = ["write_bundle"]

#: The oldest time that a zip file can state.
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
#: All cut records together (bytes, before compression); windows that do not fit are named in the manifest.
RECORD_BYTES: Final = 16 << 20


def write_bundle(
    dataset: Dataset,
    runs: Sequence[Mapping[str, Any]],
    output: Path,
    *,
    command: str = "",
    near: Sequence[Path] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Write the bundle to `output`, whole or not at all; returns its size in bytes.

    `near`: files that may be the dataset's recordings; one is used only if its SHA-256 is that of the input.
    UsageError unless `output` ends in .zip.
    """
    check_suffix(output, bundle=True)
    with (
        whole_files(output) as (staging,),
        zipfile.ZipFile(staging, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
    ):
        listed = []
        for name, what, data in _files(dataset, runs, command, near, progress):
            _put(archive, name, data)
            digest = hashlib.sha256(data).hexdigest()
            listed.append({"name": name, "what": what, "bytes": len(data), "sha256": digest})
        _put(archive, "manifest.json", _manifest(dataset, runs, listed))
    return output.stat().st_size


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix, so that the permissions below mean something
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)


def _files(
    dataset: Dataset, runs: Sequence[Mapping[str, Any]], command: str, near: Sequence[Path],
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[tuple[str, Any, bytes]]:
    """(name, what it is, content) of every file but the manifest."""
    manifest, gaps = dataset.manifest, dataset.gaps()
    times = recorded.times_of(manifest)
    beside = tables(dataset, runs, times)
    yield "report.html", "report", _bytes(html.render(dataset, runs, command=command, beside=beside, progress=progress))
    yield "report.txt", "report", _bytes(text.render(runs, manifest, gaps=gaps, beside=beside))
    yield "report.md", "report", _bytes(markdown.render(runs, manifest, gaps=gaps, beside=beside))
    yield "findings.json", "findings", _bytes(findings_json(dataset, runs, beside))
    told = stories.stories(runs, times, gaps=gaps)[:STORIES]
    if not told or not manifest.get("events"):
        return
    events = Events(dataset)
    left = RECORD_BYTES
    with ExitStack() as stack:
        sources = _sources(dataset, near, stack)
        for number, story in enumerate(told, 1):
            found = records_of(dataset, story, view_of(events, story, gaps, times))
            for name, what, data in _window(dataset, number, story, found, sources):
                if len(data) > left:
                    continue
                left -= len(data)
                yield name, what, data
            if progress:
                progress("records", number, len(told))


def _bytes(document: str) -> bytes:
    return document.encode("utf-8", "backslashreplace")


# -- records -------------------------------------------------------------------------------------------------------


def _sources(dataset: Dataset, near: Sequence[Path], stack: ExitStack) -> dict[str, tuple[str, BinaryIO]]:
    """The dataset's recordings that are at hand: source to (format, stream of the uncompressed recording)."""
    found: dict[str, tuple[str, BinaryIO]] = {}
    for item in dataset.manifest.get("inputs") or ():
        if item.get("format") not in SUFFIX:
            continue
        name = str(item.get("name", ""))
        places = [*near, dataset.path.parent / name, Path(name)]
        for path in dict.fromkeys(p for p in places if p.name == name):
            with suppress(OSError, ValueError, RecordingError):
                if not path.is_file():
                    continue
                opened = open_recording(path)
                stack.callback(opened.close)
                if opened.sha256 == item.get("sha256"):
                    found[str(item.get("source"))] = (str(item["format"]), opened.stream)
                    break
    return found


def _window(
    dataset: Dataset, number: int, story: Story, found: Records, sources: Mapping[str, tuple[str, BinaryIO]]
) -> Iterator[tuple[str, Any, bytes]]:
    """The files of one finding."""
    folder = f"records/{number:02d}-{file_name(story.id.replace(':', '-'))}"
    about = {"finding": story.id, "t0_ns": found.t0, "t1_ns": found.t1}
    cut_from: dict[str, dict[int, int]] = {source: {} for source in sources}
    for table, places in found.tables.items():
        rows = _rows(dataset, table, places)
        for source in dict.fromkeys(source for source, _ in places):
            if source in sources:
                mine = rows.filter(pl.col("source").cast(pl.String) == source)
                cut_from[source] |= dict(zip(mine["offset"].to_list(), mine["cpu"].to_list(), strict=True))
        rest = rows.filter(~pl.col("source").cast(pl.String).is_in(list(sources)))
        if rest.height:
            what = {**about, "table": table, "rows": rest.height}
            yield f"{folder}/{file_name(table)}.csv", what, csv_text(rest).encode("utf-8", "backslashreplace")
    for index, (source, offsets) in enumerate(cut_from.items()):
        if not offsets:
            continue
        format, stream = sources[source]
        stream.seek(0)
        # Records of a window header that names no CPU cannot be: 0 stands for text, which needs none.
        data = cut(format, stream, [(offset, cpu or 0) for offset, cpu in sorted(offsets.items())])
        tail = f"-{index + 1}" if len(cut_from) > 1 else ""
        what = {**about, "cut_from": source, "format": format, "offsets": sorted(offsets)}
        yield f"{folder}/records{tail}{SUFFIX[format]}", what, data or b""


def _rows(dataset: Dataset, table: str, places: Sequence[tuple[str, int]]) -> pl.DataFrame:
    """Rows of a record table by source and offset, in order; categories become strings, so that no other stays."""
    keys = pl.DataFrame(places, schema={"source": pl.String, "offset": pl.UInt64}, orient="row")
    return (
        dataset.scan(table)
        .filter(pl.col("offset").is_in(keys["offset"].unique().to_list()))
        .with_columns(pl.col("source").cast(pl.String))
        .join(keys.lazy(), on=["source", "offset"], how="semi")
        .with_columns(pl.selectors.by_dtype(pl.Categorical).cast(pl.String))
        .sort("seq")
        .collect()
    )


# -- manifest ------------------------------------------------------------------------------------------------------


def _manifest(dataset: Dataset, runs: Sequence[Mapping[str, Any]], listed: Sequence[Mapping[str, Any]]) -> bytes:
    inputs = [
        {key: item.get(key) for key in ("name", "format", "bytes", "sha256")}
        for item in dataset.manifest.get("inputs") or ()
    ]
    times = recorded.times_of(dataset.manifest)
    document = {
        "schema": 1,
        "tool": f"tracetool {__version__}",
        "inputs": inputs,
        "clock": dataset.manifest.get("clock"),
        "verdict": verdict.overall(runs),
        "episodes": len(stories.stories(runs, times)),
        "reproduce": _commands(dataset, runs, listed),
        "files": list(listed),
    }
    out = io.StringIO()
    json.dump(document, out, indent=1)
    return out.getvalue().encode() + b"\n"


def _commands(dataset: Dataset, runs: Sequence[Mapping[str, Any]], listed: Sequence[Mapping[str, Any]]) -> list[str]:
    """What makes the report again from the recordings, and what reads the cut records."""
    names = [shlex.quote(clean(i.get("name", ""))) for i in dataset.manifest.get("inputs") or ()]
    policies = dict.fromkeys(f"{r['system']}={r['policy']}" for r in runs)
    changed = [
        f"--set {r['system']}.{name}={p['value']}"
        for r in runs
        for name, p in (r.get("config") or {}).items()
        if p["value"] != p["default"]
    ]
    options = " ".join([*(f"-p {p}" for p in policies), *dict.fromkeys(changed)])
    commands = [
        f"tracetool ingest {' '.join(names)} -o again.dataset",
        f"tracetool report again.dataset {options} -o report.html --bundle again.zip",
    ]
    first = next((f for f in listed if isinstance(f["what"], Mapping)), None)
    if first is not None:
        commands.append(f"tracetool explain again.dataset {first['what']['finding']}")
        if "format" in first["what"]:
            hz = (dataset.manifest.get("clock") or {}).get("hz")
            stated = f" --cpu-hz {hz:.0f}" if hz and first["what"]["format"] == "xentrace" else ""
            read = f"tracetool ingest {first['name']} --format {first['what']['format']}{stated} -o window.dataset"
            commands += [read, "tracetool query window.dataset 'SELECT * FROM events'"]
    return commands
