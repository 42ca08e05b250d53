"""Datasets for the command tests: the sample recording, and one whose names and strings mean harm."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from parsers.recording import Gap, Note
from parsers.tables import COMMON
from replay.events import SCHEMA, events_from_json
from replay.systems import SYSTEMS
from tests.shared import SAMPLES
from tracetool.ingest import IngestOptions, ingest
from tracetool.store import Dataset, DatasetWriter

__all__ = ["ESCAPES", "HOSTILE_TABLE", "SAMPLE", "hostile_dataset", "sample_dataset"]

SAMPLE = SAMPLES / "xen-2l-dom0-idle.xentrace"
#: What must never reach a terminal as it is.
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e\u200b\x9b31m"
HOSTILE_TABLE = 'evil" UNION SELECT 1; --' + ESCAPES


def sample_dataset(target: Path) -> Dataset:
    """The sample recording, ingested."""
    ingest([str(SAMPLE)], target, IngestOptions())
    return Dataset.open(target)


def hostile_dataset(target: Path) -> Dataset:
    """A small dataset in which every string that a guest or a recorder may choose is hostile."""
    schema = pa.schema(
        [c.field() for c in COMMON] + [pa.field("comm", pa.string(), metadata={"doc": "task" + ESCAPES, "unit": ""})],
        metadata={"doc": "table" + ESCAPES},
    )
    row = {
        "seq": 0, "t_ns": 0, "t_err_ns": 0, "tsc": 0, "cpu": 0, "source": "rec" + ESCAPES, "offset": 0,
        "comm": "=cmd|'/c calc'!A1" + ESCAPES,
    }  # fmt: skip
    events = [
        {"t": 0, "kind": "idle.enter", "cpu": 0, "val": 1000, "origin": {"file": "f" + ESCAPES, "offset": 1,
                                                                        "raw_kind": HOSTILE_TABLE}},
        {"t": 400_000, "kind": "idle.exit", "cpu": 0, "origin": {"file": "f", "offset": 2, "raw_kind": "X"}},
    ]  # fmt: skip
    with DatasetWriter(target) as writer:
        writer.append(HOSTILE_TABLE, pa.Table.from_pylist([row], schema))
        writer.append("gaps", pa.Table.from_pylist([row], schema))  # a recorder may use our own names
        writer.add_gap(Gap("lost" + ESCAPES, None, None, None, 0, text="gap" + ESCAPES), "s", 100, None)
        writer.add_gap(Gap("truncated", None, None, None, 9), "s", None, None)
        writer.add_note(Note("odd", "warn", "note" + ESCAPES), "s" + ESCAPES)
        writer.close_records()
        writer.write_events([events_from_json(events, src="s" + ESCAPES)], SCHEMA)
        writer.finish(
            {
                "inputs": [{"name": "n" + ESCAPES, "source": "s" + ESCAPES, "sha256": "0", "format": "x", "bytes": 1}],
                "clock": {"unit": "ns", "hz": None, "kind": "tsc", "origin": "", "doc": ""},
                "span": {"t0_ns": 0, "t1_ns": 1_000_000, "records": 2}, "cpus": [0], "events": 2, "facts": {},
                "observed": {k: {"conf": 100, "how": "h" + ESCAPES} for k in SYSTEMS["hpet"].kinds},
                "counts": {}, "damaged": False,
            }
        )  # fmt: skip
    return Dataset.open(target)
