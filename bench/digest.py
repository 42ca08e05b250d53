"""A digest of everything that a dataset holds: whether a change of the reader or the store changed a value.

    python -m bench.digest RECORDING... > before.txt         once more after the change, then `diff`

One line for each table: recording, name, rows, SHA-256 of all its values in order. Row groups, batch sizes,
compression and dictionaries make no difference; the order of rows, nulls and types do.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracetool.ingest import IngestOptions, ingest
from tracetool.store import Dataset

__all__ = ["dataset", "main", "table"]


def _feed(column: Any, add: Any) -> None:
    """All values of an array: validity, then the values with zeros for nulls."""
    if isinstance(column, pa.ChunkedArray):
        column = column.unify_dictionaries().combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    add(pc.is_null(column).cast(pa.uint8()).to_numpy().tobytes())
    kind = column.type
    if pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            _feed(pc.struct_field(column, index), add)
    elif pa.types.is_list(kind):
        add(pc.list_value_length(column).fill_null(0).to_numpy().tobytes())
        _feed(column.flatten(), add)
    elif pa.types.is_string(kind):
        for text in column.to_pylist():
            add(b"\0" if text is None else text.encode() + b"\n")
    elif pa.types.is_boolean(kind):
        add(column.fill_null(False).cast(pa.uint8()).to_numpy().tobytes())
    else:
        add(column.fill_null(0).to_numpy().tobytes())


def table(values: pa.Table) -> str:
    """Digest of a table's columns: names, types, values."""
    whole = hashlib.sha256()
    for name in values.schema.names:
        kind = values.schema.field(name).type
        whole.update(f"{name}:{kind}\n".encode())
        _feed(values[name], whole.update)
    return whole.hexdigest()


def dataset(path: Path) -> Iterator[tuple[str, int, str]]:
    """(name, rows, digest) of every table, and of the manifest's text without what differs between runs."""
    found = Dataset.open(path)
    files = {f"records/{name}": found.table_path(name) for name in sorted(found.tables())}
    files.update({name: path / f"{name}.parquet" for name in ("events", "gaps", "notes")})
    for name, file in files.items():
        values = pq.read_table(file)
        yield name, values.num_rows, table(values)
    manifest = {k: v for k, v in found.manifest.items() if k not in ("command", "tool")}
    text = json.dumps(manifest, sort_keys=True)
    yield "manifest", len(manifest), hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Command line: see the module's text."""
    for recording in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "set"
            ingest([recording], target, IngestOptions())
            for name, rows, digest in dataset(target):
                print(Path(recording).name, name, rows, digest, sep="\t")


if __name__ == "__main__":
    main()
