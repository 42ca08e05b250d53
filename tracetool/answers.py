"""Answers of replays in the user's cache folder: a second replay of a dataset does only what is new.

Kept are the record of each run under one of our own policies, and what every what-if of a system is measured by: its
calibration and the effects that the recorded policy's what-if has. An answer is found again by the content of the
dataset, the program itself (`program`) and all that was asked; whatever differs is another answer. One file each:

    digest of the rest (hexadecimal), newline
    JSON values and bytes (arrays) as Python's marshal, which takes a third of the time of JSON text

It is the user's own folder, and the digest is looked at before anything else. A file that is damaged or gone means
that the answer is computed again. `TRACETOOL_CACHE=0` neither keeps nor uses any.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from tracetool import __version__

__all__ = ["Answers", "folder", "program"]

#: Answers together may be this large (bytes); those longest unused go.
LARGEST: Final = 1 << 30
#: Files of the program that decide what it answers.
SUFFIXES: Final = (".py", ".so", ".pyd", ".json", ".toml")

#: An answer: plain JSON values, and bytes.
Answer = tuple[Mapping[str, Any], bytes]


def folder() -> Path:
    """Where answers and datasets of recordings are kept; it may be emptied at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tracetool"


@cache
def program() -> str:
    """Digest of this program: its version and every source, so that a changed one reads nothing of another."""
    digest = hashlib.sha256(f"{__version__} {sys.version} {sys.byteorder}".encode())
    top = Path(__file__).resolve().parent.parent
    for package in ("parsers", "replay", "tracetool"):
        for path in sorted((top / package).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(f"{path.relative_to(top)} {path.stat().st_size} ".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers about one dataset. `identity` stands for its content and the program."""

    place: Path
    identity: str

    @classmethod
    def of(cls, dataset: Path) -> Answers | None:
        """Those about the dataset in this folder; None when none shall be kept."""
        if os.environ.get("TRACETOOL_CACHE") == "0":
            return None
        digest = hashlib.sha256(program().encode())
        for name in ("manifest.json", "events.parquet", "gaps.parquet"):  # all that a replay reads
            with (dataset / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return cls(folder() / "answers", digest.hexdigest())

    def has(self, *asked: Any) -> bool:
        """Whether there is an answer, be it damaged."""
        return self._path(asked).is_file()

    def get(self, *asked: Any) -> Answer | None:
        """The answer to what was asked (plain values), None if there is none."""
        path = self._path(asked)
        try:
            content = path.read_bytes()
            said, _, rest = content.partition(b"\n")
            if hashlib.sha256(rest).hexdigest().encode() != said:
                return None
            answer, arrays = marshal.loads(rest)
            os.utime(path)  # it was of use just now
            return answer, arrays
        except (OSError, ValueError, TypeError, EOFError):
            return None

    def put(self, answer: Mapping[str, Any], arrays: bytes, *asked: Any) -> None:
        """Keep an answer, if that is possible."""
        path = self._path(asked)
        rest = marshal.dumps((dict(answer), arrays))
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with suppress(OSError):
            self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                beside.write_bytes(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
            self._sweep()

    def _path(self, asked: Any) -> Path:
        text = json.dumps([self.identity, asked], sort_keys=True, default=repr)
        return self.place / hashlib.sha256(text.encode()).hexdigest()

    def _sweep(self) -> None:
        """Remove the longest unused answers beyond LARGEST, and what killed processes left."""
        found = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(self.place))
        beyond = sum(size for _, size, _ in found) - LARGEST
        for _, size, path in found:
            if beyond <= 0:
                break
            Path(path).unlink(missing_ok=True)
            beyond -= size
