"""Datasets of recordings that were given where a dataset is wanted: read once, kept by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from replay.declare import UsageError
from tracetool.answers import folder, program
from tracetool.ingest import Ingested, IngestOptions, ingest
from tracetool.store import Dataset, is_dataset

__all__ = ["dataset_of", "folder"]

Progress = Callable[[str, int, int], None]


def dataset_of(
    target: str,
    options: IngestOptions,
    progress: Progress | None = None,
    said: Callable[[Ingested], None] | None = None,
) -> Dataset:
    """The dataset at `target`, or one made of the recording there and kept by content, options and program.

    `-` is stdin. `said` hears of a recording that was read just now. UsageError when there is nothing at `target`,
    otherwise as `ingest` and `Dataset.open`.
    """
    path = Path(target)
    if path.is_dir():
        return Dataset.open(path)
    if target != "-" and not path.exists():
        raise UsageError(f"{target}: no such file or folder")
    cached = folder() / (_key(path, options) if target != "-" else f"stdin-{os.getpid()}")
    if not is_dataset(cached):
        ingested = ingest([target], cached, options, progress)
        if said is not None:
            said(ingested)
    return Dataset.open(cached)


def _key(path: Path, options: IngestOptions) -> str:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256")
    stated = (
        options.cpu_hz, options.xen_version, options.format, options.hpet_irqs, path.name, program(),
        sorted(options.event_map.items()),
    )  # fmt: skip
    content.update(repr(stated).encode())
    return content.hexdigest()[:32]
