"""A pytest plugin: writes the codes that the tests of a run raise, one a line, to the file named by REACHED."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from replay.sink import Sink

__all__ = ["pytest_sessionfinish", "pytest_sessionstart"]

_RAISED: set[str] = set()


def pytest_sessionstart(session: Any) -> None:
    """Listen to every sink."""
    report = Sink.report

    def listening(self: Sink, code: Any, *args: Any, **kwargs: Any) -> None:
        before = len(self.findings)
        report(self, code, *args, **kwargs)
        if len(self.findings) > before:
            _RAISED.add(code.name)

    Sink.report = listening  # type: ignore[method-assign]


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """Say what was raised."""
    Path(os.environ["REACHED"]).write_text("".join(f"{name}\n" for name in sorted(_RAISED)), encoding="utf-8")
