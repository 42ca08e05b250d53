"""Worker processes on this machine: each task is known to be with one worker, so the death of one costs one retry.

`concurrent.futures` gives up on all tasks when a worker dies and does not say which task killed it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from tracetool.child import cause, follow_parent, start_child
from tracetool.fleet.work import Outcome, Task, failed_row, run_task

__all__ = ["ATTEMPTS", "run_pool"]

#: A task whose worker died is given to another this often in all.
ATTEMPTS: Final = 2


class _Worker:
    """A process and our end of its pipe; `task` is what it works on."""

    def __init__(self, jobs: int) -> None:
        self.pipe, self.process = start_child(_serve, jobs=jobs)
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # a worker that is dead already is noticed by its end of the pipe
            self.pipe.send(task)

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection) -> None:
    """A worker: tasks come, outcomes go."""
    follow_parent()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(run_task(pipe.recv()))


def run_pool(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """Outcomes as they come. A worker that dies is replaced; its task is tried once more and then reported."""
    waiting = deque(tasks)
    jobs = min(jobs, len(tasks))
    workers: list[_Worker] = []
    try:
        while waiting or any(w.task for w in workers):
            while waiting and len(workers) < jobs:
                workers.append(_Worker(jobs))
            for worker in workers:
                if worker.task is None and waiting:
                    worker.give(waiting.popleft())
            ready = wait([w.pipe for w in workers if w.task])
            for worker in [w for w in workers if w.pipe in ready]:
                given, outcome = worker.task, _receive(worker)
                assert given is not None
                task, worker.task = given, None
                if outcome is not None:
                    yield outcome
                    continue
                workers.remove(worker)
                worker.process.join()
                if task.attempt < ATTEMPTS:
                    waiting.append(replace(task, attempt=task.attempt + 1))
                    continue
                said = f"its worker died {ATTEMPTS} times, last {cause(worker.process.exitcode)}"
                yield Outcome(task.name, failed_row(task, said), None)
    finally:
        for worker in workers:
            worker.stop()


def _receive(worker: _Worker) -> Outcome | None:
    try:
        outcome: Any = worker.pipe.recv()
    except (EOFError, OSError):
        return None
    assert isinstance(outcome, Outcome)
    return outcome
