"""Systems of one dataset replayed in processes of their own: they share nothing, so the records are the same.

A system is the unit: its policies share one verify run and one calibration.
"""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tracetool.answers import Answers
from tracetool.child import cause, follow_parent, start_child
from tracetool.store import Dataset, StoreError

if TYPE_CHECKING:
    from tracetool.asked import Settings

__all__ = ["can_part", "replay_systems", "usual_jobs"]

#: Fewer events than this are replayed sooner than a process is started.
LARGE_EVENTS: Final = 3_000_000
#: Memory that one process may need (bytes): libraries, a row group, the state of a machine.
PROCESS_BYTES: Final = 700 << 20

Records = list[dict[str, Any]]
Progress = Callable[[str, int, int], None]


def usual_jobs(dataset: Dataset, systems: int) -> int:
    """Processes that are worth their start: one for each core, as far as there are systems and memory."""
    if int(dataset.manifest.get("events") or 0) < LARGE_EVENTS or systems < 2:
        return 1
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return 1  # a limit for each process is meant for the whole
    return max(1, min(systems, len(os.sched_getaffinity(0)), _free_bytes() // PROCESS_BYTES))


def _free_bytes() -> int:
    """What the machine has to spare, or the memory control groups of this process allow, if that is less."""
    return min(_machine_bytes(), group_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def group_bytes(member: Path, root: Path) -> int:
    """The least limit of the control groups (v1 or v2) that `member` lists, and those above; 2**63 without one."""
    least = 1 << 63
    with suppress(OSError, ValueError):
        for line in member.read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            top, name = (root / "memory", "memory.limit_in_bytes") if kinds else (root, "memory.max")
            here = top / path.lstrip("/")
            for folder in (here, *here.parents):
                with suppress(OSError, ValueError):
                    least = min(least, int((folder / name).read_text(encoding="ascii")))  # "max": none
                if folder == top:
                    break
    return least


def _machine_bytes() -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return PROCESS_BYTES


def can_part(settings: Settings) -> bool:
    """Whether other processes can have these settings: a user's class must come from a file."""
    return all(choice.cls is None or choice.spec for choice in settings.policies)


def replay_systems(
    dataset: Dataset, settings: Settings, names: Sequence[str], jobs: int, progress: Progress | None,
    answers: Answers | None = None,
) -> list[Records]:
    """Run records of each system, in the order of `names`, from at most `jobs` processes.

    What a system raises is raised here, of the first in order; StoreError when a process dies. No process outlives
    the call, nor this process.
    """
    # A class cannot travel; its file is read again where it arrives.
    plain = replace(settings, policies=tuple(replace(choice, cls=None) for choice in settings.policies))
    waiting = deque(range(len(names)))
    done: dict[int, Records | BaseException] = {}
    working: dict[Connection, tuple[int, Any]] = {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                index = waiting.popleft()
                pipe, process = start_child(_serve, dataset, plain, answers, progress is not None, jobs=jobs)
                working[pipe] = (index, process)
                _say(pipe, names[index])
            ready = set(wait(list(working)))
            for pipe in [pipe for pipe in working if pipe in ready]:
                index, process = working[pipe]
                try:
                    what, answer = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    died = cause(process.exitcode, "out of memory? --jobs 1 needs the least")
                    raise StoreError(f"{names[index]}: its process died {died}", 5) from None
                if what == "progress":
                    if progress is not None:
                        progress(*answer)
                    continue
                done[index] = answer
                if waiting:  # a process that has started takes another: starting one takes about a second
                    working[pipe] = (waiting.popleft(), process)
                    _say(pipe, names[working[pipe][0]])
                    continue
                _say(pipe, None)
                del working[pipe]
                pipe.close()
                process.join()
    finally:
        for pipe, (_, process) in working.items():
            process.kill()
            process.join()
            pipe.close()
    for index in range(len(names)):
        answer = done[index]
        if isinstance(answer, BaseException):
            raise answer
    return [done[index] for index in range(len(names))]  # type: ignore[misc]


def _say(pipe: Connection, name: str | None) -> None:
    """The next system for a process; one that has died is noticed when it is listened to."""
    with suppress(OSError):
        pipe.send(name)


def _serve(pipe: Connection, dataset: Dataset, settings: Settings, answers: Answers | None, talks: bool) -> None:
    """One system after the other, as they are named through the pipe, in a process of its own."""
    follow_parent()
    from tracetool.asked import choose
    from tracetool.replaying import replay_dataset  # which imports this module

    def tell(*said: Any) -> None:
        pipe.send(("progress", said))

    while (name := pipe.recv()) is not None:
        answer: Records | BaseException
        try:
            policies = tuple(choose(choice.spec) if choice.spec else choice for choice in settings.policies)
            asked = replace(settings, policies=policies, systems=(name,))
            answer = replay_dataset(dataset, asked, tell if talks else None, answers=answers)
        except Exception as error:
            answer = error
        with suppress(OSError):  # nobody listens any more
            try:
                pipe.send(("done", answer))
            except (TypeError, AttributeError, ValueError) as error:  # an exception that cannot travel
                pipe.send(("done", RuntimeError(f"{type(answer).__name__}: {answer} ({error})")))
