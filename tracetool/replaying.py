"""Replays of a dataset: which systems, which policies, in which mode, and the record of each run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from replay.declare import UsageError
from replay.systems import SYSTEMS
from tracetool import parallel
from tracetool.answers import Answers
from tracetool.asked import Choice, Settings, choose, choose_recorded
from tracetool.beside import open_beside
from tracetool.seen import blind_share, checkable, not_replayed, observations, rules_of
from tracetool.session import Session
from tracetool.store import Dataset

__all__ = [
    "Choice", "Settings", "blind_share", "checkable", "choose", "choose_recorded", "not_replayed", "observations",
    "replay_dataset", "rules_of",
]  # fmt: skip

#: New objects after which Python looks for cycles while a replay runs.
COLLECT_EVERY: Final = 100_000


def replay_dataset(
    dataset: Dataset,
    settings: Settings,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    jobs: int | None = 1,
    answers: Answers | None = None,
) -> list[dict[str, Any]]:
    """Run every system under every policy asked for; returns run records (see `results.run_record`).

    Without `settings.systems` all that can be checked are run. The recorded policy is verified against the recording;
    another policy is a what-if on the recorded stimuli, with calibration and horizon. `progress` is called with what is
    done, and how many of how many events. With `jobs` above 1, or None and a large dataset, systems are replayed in
    processes of their own; the records are the same. `answers`: what earlier replays of the dataset found.
    """
    can = checkable(dataset)
    names = list(settings.systems) or list(can)
    for name in names:
        if name not in SYSTEMS:
            raise UsageError(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    sessions = {name: Session(dataset, SYSTEMS[name], settings, progress, answers) for name in names}
    new = [name for name in names if not sessions[name].is_known()]
    jobs = parallel.usual_jobs(dataset, len(new)) if jobs is None else min(jobs, len(new))
    done: dict[str, list[dict[str, Any]]] = {}
    if jobs > 1 and parallel.can_part(settings):
        parts = parallel.replay_systems(dataset, settings, new, jobs, progress, answers)
        done = dict(zip(new, parts, strict=True))
    with _rarely_collected():
        open_beside(dataset, [sessions[name] for name in new if name not in done], progress)
        return [record for name in names for record in (done[name] if name in done else sessions[name].records())]


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """A replay makes many objects and hardly a cycle: looking for cycles as often as usual takes an eighth of it."""
    usual = gc.get_threshold()
    gc.set_threshold(max(usual[0], COLLECT_EVERY), *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
