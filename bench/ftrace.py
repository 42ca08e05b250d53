"""The Linux readers beside `trace-cmd report`: trace.dat, its text with all columns, and five events of it.

    python -m bench.ftrace FILE.dat[.zst]...

Every column is CPU time (user + system), median of `--repeat` interleaved rounds. A child process imports the
readers and reads the file once to be warm, then is timed on a second reading; so start-up (about 0.25 s of imports,
in tracetool's own start) is left out of the ratio and shown beside it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.measure import megabytes, run

__all__ = ["FIVE", "main"]

#: Events that the irq, timer and idle bindings start from.
FIVE: Final = ("irq_handler_entry", "irq_handler_exit", "hrtimer_expire_entry", "cpu_idle", "sched_wakeup")


def _read(path: str, only: frozenset[str]) -> float:
    from parsers.formats import sniff
    from parsers.open import open_recording
    from parsers.recording import ReadOptions

    begin = time.process_time()
    with open_recording(path) as opened:
        reader = sniff(opened.head())
        if reader is None:
            raise SystemExit(f"{path}: no known format")
        for chunk in reader(opened.stream, ReadOptions(source="bench", only=only)).chunks():
            del chunk
    return time.process_time() - begin


def _child(path: str, only: str) -> float:
    """CPU seconds of one warm reading in a process of its own."""
    command = (sys.executable, "-m", "bench.ftrace", "--once", path, "--only", only)
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def _unpacked(path: str, scratch: Path) -> str:
    if not path.endswith(".zst"):
        return path
    target = str(scratch / Path(path).stem)
    run(("zstd", "-dqf", path, "-o", target))
    return target


def measure(path: str, scratch: Path, repeat: int) -> None:
    """One line of Markdown for each way to read `path` and trace-cmd's text of it."""
    data, text = _unpacked(path, scratch), str(scratch / "report.txt")
    run(("trace-cmd", "report", "-i", data), output=text)
    ways = {"trace.dat": (data, ""), "text, all columns": (text, ""), "text, five events": (text, ",".join(FIVE))}
    seen: dict[str, list[float]] = {name: [] for name in ("trace-cmd report", *ways)}
    for _ in range(repeat):
        seen["trace-cmd report"].append(run(("trace-cmd", "report", "-i", data)).cpu)
        for name, (source, only) in ways.items():
            seen[name].append(_child(source, only))
    peer = statistics.median(seen["trace-cmd report"])
    for name, values in seen.items():
        cpu = statistics.median(values)
        size = megabytes(ways[name][0] if name in ways else data)
        print(f"| {'/'.join(Path(path).parts[-2:])} | {name} | {size:.1f} | {cpu:.3f} | {cpu / peer:.2f} |", flush=True)


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        only = frozenset(filter(None, given.only.split(",")))
        _read(given.once, only)
        print(_read(given.once, only))
        return
    print("| recording | reading | MB | CPU s | ÷ `trace-cmd report` |\n|---|---|---|---|---|")
    for path in given.files:
        with tempfile.TemporaryDirectory() as scratch:
            measure(path, Path(scratch), given.repeat)


if __name__ == "__main__":
    main()
