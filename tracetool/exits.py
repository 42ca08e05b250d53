"""Exit codes, and the one place where an exception becomes a line and a code."""

from __future__ import annotations

import os
import re
from typing import Final

__all__ = ["CLEAN", "FINDINGS", "INCONCLUSIVE", "INTERNAL", "UNREADABLE", "USAGE", "describe"]

CLEAN: Final = 0
FINDINGS: Final = 1  # at or above --fail-on
USAGE: Final = 2
UNREADABLE: Final = 3
INCONCLUSIVE: Final = 4  # a system asked for is blind, or gaps cover it
INTERNAL: Final = 5


def describe(error: BaseException) -> tuple[str, int]:
    """One line for people, and the exit code, for an exception that ended a command."""
    from parsers.recording import RecordingError
    from replay.declare import UsageError
    from tracetool.store import StoreError

    if isinstance(error, RecordingError):
        return str(error), UNREADABLE
    if isinstance(error, UsageError):
        return str(error), USAGE
    if isinstance(error, StoreError):
        return str(error), error.code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", INTERNAL if error.filename is None else UNREADABLE
    written = re.search(r"\(os error (\d+)\)", str(error))  # polars' writers
    if written:
        return f"cannot write: {os.strerror(int(written[1]))}", INTERNAL
    if isinstance(error, MemoryError):
        return "out of memory", INTERNAL
    kind = type(error).__name__
    text = str(error).splitlines()[0] if str(error) else ""
    return f"internal error: {kind}: {text} (set TRACETOOL_DEBUG=1 for details, please report)", INTERNAL
