"""Reads a recording into Arrow tables and drops them: what parsing alone costs.

    python -m bench.parse RECORDING [EVENT,EVENT…]        only these events
"""

from __future__ import annotations

import sys

from tracetool.__main__ import prepare

__all__ = ["main", "parse"]


def parse(path: str, only: frozenset[str] = frozenset()) -> int:
    """Number of records in all tables."""
    from parsers.formats import sniff
    from parsers.open import open_recording
    from parsers.recording import ReadOptions

    with open_recording(path) as opened:
        cls = sniff(opened.head())
        if cls is None:
            raise SystemExit(f"{path}: no known format")
        reader = cls(opened.stream, ReadOptions(source="bench", only=only))
        rows = 0
        for chunk in reader.chunks():
            rows += sum(table.num_rows for table in chunk.tables.values())
            del chunk  # not needed while the next one is made
        return rows


def main() -> None:
    """Command line, in a process with the settings of tracetool's own."""
    prepare()
    print(parse(sys.argv[1], frozenset(sys.argv[2].split(",")) if len(sys.argv) > 2 else frozenset()))


if __name__ == "__main__":
    main()
