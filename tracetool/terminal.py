"""What goes to the terminal: progress on stderr, data on stdout, nothing that could control either."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["clean", "error", "note", "progress_bar", "show"]

#: A bar appears only when the work has taken this long (seconds).
PATIENCE: Final = 1.0


def clean(text: str) -> str:
    """A string of unknown origin, safe to print: control and direction-changing characters are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def error(text: str) -> None:
    """One line on stderr."""
    print(f"tracetool: {clean(text)}", file=sys.stderr)


def note(text: str) -> None:
    """One informative line on stderr."""
    print(clean(text), file=sys.stderr)


def show(text: Text) -> None:
    """Styled text on stdout: coloured on a terminal (rich knows NO_COLOR and dumb terminals), plain elsewhere."""
    from rich.console import Console

    Console(highlight=False, emoji=False).print(text, soft_wrap=True)


def _rate(speed: float, unit: str) -> str:
    """`12.3 MB/s`, `4.5 k/s`, `0.7/s`."""
    for prefix, scale in (("M", 1e6), ("k", 1e3)):
        if speed >= scale:
            return f"{speed / scale:.1f} {prefix}{unit}/s"
    return f"{speed:.1f}{' ' + unit if unit else ''}/s"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callable (what, done, total) that draws a bar with rate and time left; None when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text as Words

    class Rate(ProgressColumn):
        """Bytes a second while reading; events, stories, recordings a second otherwise."""

        def render(self, task: Task) -> Words:
            return Words(_rate(task.finished_speed or task.speed or 0.0, "B" if task.description == "reading" else ""))

    started = time.monotonic()
    bar = Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, int] = {}

    def advance(what: str, done: int, total: int) -> None:
        if time.monotonic() - started < PATIENCE:
            return
        if not bar.live.is_started:
            bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
