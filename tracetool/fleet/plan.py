"""Which recordings a fleet run covers, what each is called, and when a stored result is still the answer."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote
from zlib import crc32

from replay.declare import UsageError
from replay.sink import KEEP
from tracetool import __version__
from tracetool.ingest import IngestOptions
from tracetool.store import is_dataset

__all__ = ["SKIPPED_SUFFIXES", "Job", "Stamp", "Target", "find", "partition", "stamp_of"]

#: Files that lie beside recordings and are none; left out of folders (never when named or matched by a pattern).
SKIPPED_SUFFIXES: Final = frozenset(
    {
        ".arrow", ".c", ".cfg", ".conf", ".counts", ".css", ".csv", ".diff", ".h", ".html", ".js", ".json", ".md",
        ".parquet", ".patch", ".pdf", ".pftrace", ".png", ".py", ".rst", ".sh", ".svg", ".toml", ".tsv", ".xml",
        ".yaml", ".yml",
    }
)  # fmt: skip
#: Longest name of a partition's folder in bytes; file systems take 255.
NAME_BYTES: Final = 200

#: (size, mtime ns, ctime ns) of a file.
Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Target:
    """One recording (or finished dataset): the name that its results get, and where it is."""

    name: str
    path: str

    @property
    def size(self) -> int:
        """Bytes, 0 when it cannot be looked at."""
        try:
            return Path(self.path).stat().st_size
        except OSError:
            return 0


@dataclass(frozen=True, slots=True)
class Job:
    """What is done to every recording. All of it is plain data: it travels to other processes and machines."""

    policies: tuple[str, ...] = ("current",)
    systems: tuple[str, ...] = ()
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: IngestOptions = field(default_factory=IngestOptions)
    version_from: str | None = None
    recorded: tuple[str, ...] = ()
    keep: int = KEEP
    tool: str = __version__

    def digest(self) -> str:
        """Equal for jobs that give equal results: policies (a user's file by its bytes), settings, tool version."""
        stated = (
            [(spec, _code_of(spec)) for spec in self.policies], self.systems,
            sorted((s, sorted(v.items())) for s, v in self.values.items()),
            self.options.cpu_hz, self.options.xen_version, self.options.format, self.options.hpet_irqs,
            sorted((k, sorted(v.items())) for k, v in self.options.event_map.items()), self.version_from, self.tool,
            sorted(self.recorded), self.keep,
        )  # fmt: skip
        return hashlib.sha256(repr(stated).encode()).hexdigest()[:32]


def _code_of(spec: str) -> str:
    """Hash of the file of a user's policy, empty for our own."""
    if ".py:" not in spec:
        return ""
    try:
        return hashlib.sha256(Path(spec.rpartition(":")[0]).read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{spec}: {error.strerror or error}") from None


def find(given: Sequence[str], output: Path) -> tuple[list[Target], int]:
    """Recordings below folders, matched by patterns, or named; and how many other files were left out.

    A folder that is a dataset is one target. Hidden files and `output` are never looked at. UsageError for what does
    not exist and for a pattern without a match.
    """
    out = output.resolve()
    paths: dict[str, str] = {}  # real path -> name wanted
    skipped = 0
    for text in given:
        for path in _matches(text):
            if path.is_dir() and not is_dataset(path):
                for found in _below(path, out):
                    if found.suffix.lower() in SKIPPED_SUFFIXES:
                        skipped += 1
                    else:
                        paths.setdefault(_place(found), str(found.relative_to(path)))
            else:
                paths.setdefault(_place(path), path.name)
    return _named(paths), skipped


def _place(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - a link is called what its user calls it


def _matches(text: str) -> Iterable[Path]:
    if os.path.lexists(text):
        return [Path(text)]
    found = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []  # noqa: PTH207 - "**" and absolute
    if not found:
        raise UsageError(f"{text}: no such file or folder")
    return map(Path, found)


def _below(folder: Path, out: Path) -> Iterable[Path]:
    """Regular files and datasets, in order of their names."""
    for base, folders, files in os.walk(folder):
        here = Path(base)
        datasets = [f for f in folders if is_dataset(here / f)]
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and f not in datasets and (here / f).resolve() != out
        )
        for name in sorted([*files, *datasets]):
            # A pipe or a device would be waited for, or never end.
            if not name.startswith(".") and ((here / name).is_file() or name in datasets):
                yield here / name


def _named(paths: Mapping[str, str]) -> list[Target]:
    """Names are unique: of equal ones each gets a checksum of its place."""
    taken: dict[str, int] = {}
    for name in paths.values():
        taken[name] = taken.get(name, 0) + 1
    named = []
    for path, name in sorted(paths.items()):
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        if taken[name] > 1 or len(partition(shown)) > NAME_BYTES:
            shown = f"{shown[: NAME_BYTES // 4]}~{crc32(os.fsencode(path)):08x}"
        named.append(Target(shown, path))
    return named


def partition(name: str) -> str:
    """Folder of a recording's rows, `recording=<name>` in the way that Hive, Arrow and polars unquote."""
    return f"recording={quote(name, safe='')}"


def stamp_of(path: str) -> Stamp | None:
    """What changes when a file's content may have; None when it cannot be looked at. A dataset is its manifest."""
    try:
        at = Path(path)
        stat = (at / "manifest.json" if at.is_dir() else at).stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
