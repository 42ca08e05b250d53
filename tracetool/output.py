"""Files that appear whole or not at all, whatever ends the run that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from replay.declare import UsageError
from tracetool.store import StoreError

__all__ = ["spare_inputs", "whole_files"]


def spare_inputs(outputs: Iterable[Path | None], *inputs: str) -> None:
    """UsageError when an output is the recording itself, or lies in the dataset: inputs are never written to."""
    for output in filter(None, outputs):
        for given in map(Path, inputs):
            with suppress(OSError):
                if output.exists() and given.exists() and output.samefile(given):
                    raise UsageError(f"{output} is the input: choose another name")
                if given.is_dir() and output.resolve().is_relative_to(given.resolve()):
                    raise UsageError(f"{output} would lie inside the dataset: choose another place")


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
