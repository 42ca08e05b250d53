"""CPU time and peak memory of commands, measured in turns so that a busy machine disturbs all of them alike.

Imports nothing but the standard library: the peak memory of a child counts from the size of its parent.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "interleaved", "python", "run"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of CPU (user + system) and wall time, peak resident MiB."""

    cpu: float
    wall: float
    rss: float


def python(*arguments: str) -> tuple[str, ...]:
    """A command that runs this interpreter."""
    return (sys.executable, *arguments)


def run(command: Sequence[str], *, output: str = os.devnull) -> Usage:
    """Run a command with its stdout in `output` and no stderr. RuntimeError when it fails."""
    begin = time.monotonic()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [(os.POSIX_SPAWN_OPEN, 1, output, flags, 0o644), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
    child = os.posix_spawnp(command[0], list(command), _environment(), file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return Usage(usage.ru_utime + usage.ru_stime, time.monotonic() - begin, usage.ru_maxrss / 1024)


def _environment() -> dict[str, str]:
    """This process's, with compiled modules kept: an installed package has them, and compiling costs half a second."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {"PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / f"bench-pycache-{os.getuid()}"), **kept}


def interleaved(commands: Mapping[str, Sequence[str]], repeat: int = 3, *, best: bool = False) -> dict[str, Usage]:
    """Median (or lowest) times and highest peaks of `repeat` rounds; in each round every command runs once."""
    seen: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            seen[name].append(run(command))
    of: Callable[[Iterable[float]], float] = min if best else statistics.median
    return {
        name: Usage(of(u.cpu for u in usages), of(u.wall for u in usages), max(u.rss for u in usages))
        for name, usages in seen.items()
    }


def megabytes(path: str | Path) -> float:
    """Size of a file in MB (10**6 bytes)."""
    return Path(path).stat().st_size / 1e6
