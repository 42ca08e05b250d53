"""Reader of trace-cmd's binary container `trace.dat`, versions 6 and 7."""

from __future__ import annotations

from parsers.tracedat.reader import TraceDatReader

__all__ = ["TraceDatReader"]
