"""Processes that work for this one, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["cause", "follow_parent", "start_child"]


def start_child(serve: Callable[..., None], *args: Any, jobs: int) -> tuple[Connection, Any]:
    """A process that runs `serve(pipe, *args)`, with its share of the cores if there are `jobs` of them; our end of
    the pipe, and the process."""
    context = multiprocessing.get_context("spawn")  # polars and Arrow have threads: no fork
    ours, theirs = context.Pipe()
    held = os.environ.get("POLARS_MAX_THREADS")
    threads = max(1, (os.cpu_count() or 1) // max(1, jobs))
    os.environ.setdefault("POLARS_MAX_THREADS", str(threads))  # read when the process imports polars
    try:
        process = context.Process(target=serve, args=(theirs, *args), daemon=True)
        process.start()
    finally:
        theirs.close()
        if held is None:
            del os.environ["POLARS_MAX_THREADS"]
    return ours, process


def follow_parent() -> None:
    """Called first in a child: it leaves Ctrl-C to its parent and ends with it, even in the middle of its work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def cause(code: int | None, killed: str = "out of memory?") -> str:
    """How a child died, in words; `killed` is what SIGKILL may mean."""
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"by {signal.Signals(-code).name}" + (f" ({killed})" if code == -signal.SIGKILL else "")
    return f"with exit code {code}"
