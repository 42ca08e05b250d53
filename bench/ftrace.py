"""The Linux readers beside `trace-cmd report`: trace.dat, its text with all columns, and five events of it.

    python -m bench.ftrace FILE.dat[.zst]...

CPU time (user + system) of whole processes, start-up included, and peak memory; best of `--repeat` interleaved
rounds. Meant for recordings that `bench.big_ftrace` made: with a few MB the start of Python is most of it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Final

from bench.measure import interleaved, megabytes, python, run

__all__ = ["FIVE", "main"]

#: Events that the irq, timer and idle bindings start from.
FIVE: Final = ("irq_handler_entry", "irq_handler_exit", "hrtimer_expire_entry", "cpu_idle", "sched_wakeup")


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
    usages = interleaved(
        {
            "trace-cmd report": ("trace-cmd", "report", "-i", data),
            "trace.dat": python("-m", "bench.parse", data),
            "text, all columns": python("-m", "bench.parse", text),
            "text, five events": python("-m", "bench.parse", text, ",".join(FIVE)),
        },
        repeat,
        best=True,
    )
    peer = usages["trace-cmd report"].cpu
    for name, usage in usages.items():
        size = megabytes(text if name.startswith("text") else data)
        ratio = usage.cpu / peer
        cells = (Path(path).name, name, f"{size:.0f}", f"{usage.cpu:.2f}", f"{usage.rss:.0f}", f"{ratio:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    print("| recording | reading | MB | CPU s | peak MiB | ÷ `trace-cmd report` |\n|---|---|---|---|---|---|")
    for path in given.files:
        with tempfile.TemporaryDirectory() as scratch:
            measure(path, Path(scratch), given.repeat)


if __name__ == "__main__":
    main()
