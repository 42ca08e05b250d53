"""Datasets of recordings that were given where a dataset is wanted: read once, kept by content.

Together they may take LARGEST bytes, or as many GB as TRACETOOL_CACHE_GB says; beyond that those longest unused go. One
that a process uses stays: it holds a shared lock (flock) on the folder until it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from replay.declare import UsageError
from tracetool.answers import folder, program
from tracetool.ingest import Ingested, IngestOptions, ingest
from tracetool.store import Dataset, is_dataset

__all__ = ["LARGEST", "VARIABLE", "dataset_of", "folder"]

#: Datasets together may be this large (bytes) ...
LARGEST: Final = 16 * 10**9
#: ... unless this environment variable says another number of GB; with 0 only those in use stay.
VARIABLE: Final = "TRACETOOL_CACHE_GB"
#: Names of kept datasets, and of what is being removed.
_KEPT: Final = re.compile(r"[0-9a-f]{32}|stdin-\d+")
_GONE: Final = re.compile(rf"\.({_KEPT.pattern})\.gone-\d+")

#: Datasets that this process uses, by device and inode: the open folder whose lock keeps them.
_HELD: Final[dict[tuple[int, int], int]] = {}

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
    largest = _largest()
    cached = folder() / (_key(path, options) if target != "-" else f"stdin-{os.getpid()}")
    if not (is_dataset(cached) and _hold(cached)):
        ingested = ingest([target], cached, options, progress)
        _hold(cached)
        with suppress(OSError):
            _sweep(cached.parent, largest)
        if said is not None:
            said(ingested)
    with suppress(OSError):
        os.utime(cached)  # it was of use just now
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


def _largest() -> int:
    """What all datasets together may take, in bytes."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return LARGEST
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"{VARIABLE} wants a number of GB, not {text!r}")
    return int(number * 10**9)


def _hold(dataset: Path) -> bool:
    """Nobody may remove this dataset while the process lives. False when somebody just did."""
    try:
        place = os.open(dataset, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    with suppress(OSError):  # a file system without locks: nobody can take the other lock either
        fcntl.flock(place, fcntl.LOCK_SH)
    mine = os.fstat(place)
    there = False
    with suppress(OSError):
        there = os.path.samestat(mine, dataset.stat())
    if there and (mine.st_dev, mine.st_ino) not in _HELD:
        _HELD[mine.st_dev, mine.st_ino] = place  # stays open: the lock lasts as long
    else:
        os.close(place)
    return there


def _sweep(place: Path, largest: int) -> None:
    """Remove the longest unused datasets beyond `largest` bytes, and what killed processes were removing."""
    found = []
    for entry in os.scandir(place):
        if _GONE.fullmatch(entry.name):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif _KEPT.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            size = sum(file.lstat().st_size for file in Path(entry.path).rglob("*"))
            found.append((entry.stat().st_mtime_ns, size, Path(entry.path)))
    beyond = sum(size for _, size, _ in found) - largest
    for _, size, path in sorted(found):
        if beyond <= 0:
            break
        if _remove(path):
            beyond -= size


def _remove(dataset: Path) -> bool:
    """Remove a dataset unless it is in use; from its place at once, so that never half of one is found there."""
    try:
        place = os.open(dataset, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    gone = dataset.with_name(f".{dataset.name}.gone-{os.getpid()}")
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dataset.rename(gone)
    except OSError:
        return False
    finally:
        os.close(place)
    shutil.rmtree(gone, ignore_errors=True)
    return True
