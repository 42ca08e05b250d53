"""The same tasks on a Dask cluster whose machines share the file system. Needs the extra `tracetool[dask]`."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

from replay.declare import UsageError
from tracetool.fleet.work import Outcome, Task, failed_row, run_task
from tracetool.store import StoreError

__all__ = ["PREFIX", "run_cluster"]

PREFIX: Final = "dask://"
#: Seconds to wait for the scheduler, and for a worker when there is none.
CONNECT_S: Final = 10
PATIENCE_S: Final = 60


def run_cluster(tasks: Sequence[Task], engine: str, patience: float = PATIENCE_S) -> Iterator[Outcome]:
    """Outcomes as they come. The scheduler gives the tasks of a lost worker to others; a task that killed more workers
    than it allows (`distributed.scheduler.allowed-failures`) is reported.

    UsageError without the extra or the cluster; StoreError when no worker is left for `patience` seconds.
    """
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        raise UsageError("--engine dask://… needs the extra: pip install 'tracetool[dask]'") from None
    address = "tcp://" + engine.removeprefix(PREFIX)
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(f"{engine}: no Dask scheduler answers: {error}") from None
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        # Not pure: the files may have changed since a task of that name ran. Retries are for workers that died only,
        # which is the scheduler's own business: run_task raises nothing.
        futures = client.map(run_task, tasks, pure=False, key=[f"tracetool-{time.time_ns()}-{t.name}" for t in tasks])
        by_key = {f.key: t for f, t in zip(futures, tasks, strict=True)}
        for future in futures:
            future.add_done_callback(done.put)
        left = len(futures)
        alone_since = None
        while left:
            try:
                future = done.get(timeout=1.0)
            except queue.Empty:
                alone_since = None if _workers(client) else alone_since or time.monotonic()
                if alone_since and time.monotonic() - alone_since > patience:
                    text = f"{engine}: no worker left; {left} recordings wait: run the command again"
                    raise StoreError(text, 5) from None
                continue
            left -= 1
            yield _outcome(future, by_key[future.key])
    finally:
        with suppress(Exception):
            client.close(timeout=CONNECT_S)


def _workers(client: Any) -> int:
    try:
        return len(client.scheduler_info(n_workers=-1)["workers"])
    except Exception:  # the scheduler is away: as if there were none
        return 0


def _outcome(future: Any, task: Task) -> Outcome:
    try:
        outcome = future.result(timeout=CONNECT_S)
    except Exception as error:
        kind = type(error).__name__
        said = "its workers died, one after the other" if kind == "KilledWorker" else f"lost on the cluster: {kind}"
        return Outcome(task.name, failed_row(task, said), None)
    assert isinstance(outcome, Outcome)
    return outcome
