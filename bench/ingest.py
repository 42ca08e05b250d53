"""Ingest beside the tools that users have now, in turns on the same file: CPU time, ratio, peak memory.

    python -m bench.ingest xentrace FILE...      xenalyze -a, xenalyze -s
    python -m bench.ingest tracedat FILE...      trace-cmd report
    python -m bench.ingest ftrace FILE.dat...    trace-cmd report, our reader on the text that it writes
    python -m bench.ingest replay FILE...        ingest and replay beside xenalyze -a

Prints Markdown tables. Medians of `--repeat` rounds (3). The peers are Debian's xen-utils-4.17 and trace-cmd.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.measure import Usage, interleaved, megabytes, python, run

__all__ = ["main"]

#: Without it xenalyze takes an exit of AMD hardware for one of Intel's; harmless where there is no HVM guest.
SVM: Final = "--svm-mode"


def _table(title: str, usages: Mapping[str, Usage], peers: Sequence[str]) -> None:
    """One Markdown table: every command, and its CPU time as a ratio to each peer's."""
    print(f"\n{title}\n")
    print("| command | CPU s | peak MiB | " + " | ".join(f"÷ `{peer}`" for peer in peers) + " |")
    print("|---|---|---|" + "---|" * len(peers))
    for name, usage in usages.items():
        ratios = " | ".join("" if name in peers else f"{usage.cpu / usages[peer].cpu:.2f}" for peer in peers)
        print(f"| {name} | {usage.cpu:.2f} | {usage.rss:.0f} | {ratios} |", flush=True)


def xentrace(path: str, scratch: Path, repeat: int) -> None:
    """Parsing alone, and the whole ingest with store and binding, beside xenalyze."""
    usages = interleaved(
        {
            "xenalyze -a": ("xenalyze", SVM, "-a", path),
            "xenalyze -s": ("xenalyze", SVM, "-s", path),
            "parse to Arrow": python("-m", "bench.parse", path),
            "tracetool ingest": python("-m", "tracetool", "ingest", "--force", path, "-o", str(scratch / "set")),
        },
        repeat,
    )
    _table(f"{megabytes(path):.0f} MB of xentrace", usages, ("xenalyze -a", "xenalyze -s"))


def tracedat(path: str, scratch: Path, repeat: int) -> None:
    """Our reader of trace.dat beside trace-cmd's text."""
    usages = interleaved(
        {
            "trace-cmd report": ("trace-cmd", "report", "-i", path),
            "parse to Arrow": python("-m", "bench.parse", path),
        },
        repeat,
    )
    _table(f"{megabytes(path):.0f} MB of trace.dat", usages, ("trace-cmd report",))


def ftrace(path: str, scratch: Path, repeat: int) -> None:
    """Our reader of the text beside the tool that writes it."""
    text = str(scratch / "report.txt")
    run(("trace-cmd", "report", "-i", path), output=text)
    usages = interleaved(
        {
            "trace-cmd report": ("trace-cmd", "report", "-i", path),
            "parse the text to Arrow": python("-m", "bench.parse", text),
        },
        repeat,
    )
    sizes = f"{megabytes(text):.0f} MB of text from {megabytes(path):.0f} MB of trace.dat"
    _table(sizes, usages, ("trace-cmd report",))


def replay(path: str, scratch: Path, repeat: int) -> None:
    """From a recording to findings, beside the peer's text."""
    target = str(scratch / "set")
    run(python("-m", "tracetool", "ingest", "--force", path, "-o", target))
    usages = interleaved(
        {
            "xenalyze -a": ("xenalyze", SVM, "-a", path),
            "tracetool ingest": python("-m", "tracetool", "ingest", "--force", path, "-o", str(scratch / "other")),
            "tracetool replay": python("-m", "tracetool", "replay", "--fail-on", "never", target),
        },
        repeat,
    )
    both = [usages["tracetool ingest"], usages["tracetool replay"]]
    usages["ingest and replay"] = Usage(
        sum(u.cpu for u in both), sum(u.wall for u in both), max(u.rss for u in both)
    )
    _table(f"{megabytes(path):.0f} MB of xentrace", usages, ("xenalyze -a",))
    wall = ", ".join(f"{name} {usage.wall:.1f} s" for name, usage in usages.items())
    print(f"\nWall time on a shared machine: {wall}")


_WHAT: Final[Mapping[str, tuple[Callable[[str, Path, int], None], str]]] = {
    "xentrace": (xentrace, "xenalyze"),
    "tracedat": (tracedat, "trace-cmd"),
    "ftrace": (ftrace, "trace-cmd"),
    "replay": (replay, "xenalyze"),
}


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=_WHAT)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args(arguments)
    measure, peer = _WHAT[given.what]
    if shutil.which(peer) is None:
        raise SystemExit(f"{peer} is not installed (Debian: xen-utils-4.17, trace-cmd)")
    for path in given.files:
        with tempfile.TemporaryDirectory() as scratch:
            measure(path, Path(scratch), given.repeat)


if __name__ == "__main__":
    main()
