"""Files that appear whole or not at all, whatever ends the run that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tracetool.store import StoreError

__all__ = ["whole_files"]


@contextmanager
def whole_files(*outputs: Path) -> Iterator[list[Path]]:
    """Paths beside the outputs to write to; renamed when all went well, gone otherwise. StoreError for OSError."""
    staged = [path.with_name(f".{path.name}.partial-{os.getpid()}") for path in outputs]
    try:
        yield staged
        for temporary, path in zip(staged, outputs, strict=True):
            temporary.rename(path)
    except OSError as error:
        raise StoreError(f"{outputs[0]}: cannot write: {error.strerror or error}", 5) from None
    finally:
        for temporary in staged:
            with suppress(OSError):
                temporary.unlink()
