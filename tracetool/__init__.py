"""The command line, the dataset store and the reports. `tracetool.open(path)`: a dataset or a recording for Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracetool.api import Trace, open

__all__ = ["Trace", "__version__", "open"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`open` and `Trace` on first use: the command line's `--help` must not pay for polars."""
    if name in ("open", "Trace"):
        from tracetool import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
