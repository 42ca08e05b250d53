"""Entry point: every error becomes one line on stderr and an exit code; no traceback reaches a user."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

__all__ = ["main", "prepare"]


def prepare(command: str = "") -> None:
    """Settings of libraries for a process that is tracetool's own; they are read when a library is first imported.

    What the user has set stays.
    """
    # Arrow allocates as NumPy does, and polars' allocator gives back what it has freed: three allocators that each keep
    # theirs doubled the peak.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    os.environ.setdefault("_RJEM_MALLOC_CONF", "narenas:2,muzzy_decay_ms:0")
    # nothing here multiplies matrices: NumPy's threads for that would only wait, and use 0.04 s of CPU doing so
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if command != "query":  # all else looks at some rows at a time, where threads mostly wait for each other
        os.environ.setdefault("POLARS_MAX_THREADS", "1")
    # Imports and findings are many objects without a cycle: looking for cycles as often as usual takes a tenth of them.
    gc.set_threshold(1_000_000, 20, 100)


def main() -> NoReturn:
    """Run the command line (`tracetool …`)."""
    prepare(sys.argv[1] if len(sys.argv) > 1 else "")
    try:
        from tracetool.cli import run

        code = run(sys.argv[1:], debug=bool(os.environ.get("TRACETOOL_DEBUG")))
    except KeyboardInterrupt:  # before anything was begun, or after all was done
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
