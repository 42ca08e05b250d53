"""One record missing from a real GIC log is one finding, not one for each interrupt that follows."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.systems import SYSTEMS
from tests.shared import SAMPLES
from tracetool.ingest import IngestOptions, ingest
from tracetool.session import MEASURED_COLUMNS
from tracetool.store import Dataset

GIC = SYSTEMS["gic"]


class Log:
    """The canonical events of the Arm log, and what is observed in it."""

    def __init__(self, folder: Path) -> None:
        ingest([str(SAMPLES / "qemu-arm64-gic.log.gz")], folder, IngestOptions())
        dataset = Dataset.open(folder)
        self.events = pa.concat_tables(list(dataset.event_batches(list(GIC.kinds), MEASURED_COLUMNS)))
        self.observed = frozenset(dataset.manifest["observed"])
        self.kinds = self.events["kind"].to_pylist()
        self.flags = self.events["flags"].to_pylist()

    def run(self, without: int | None = None) -> Run:
        events = self.events
        if without is not None:
            events = pa.concat_tables([events.slice(0, without), events.slice(without + 1)])
        return run_machine(
            GIC, "any", [events], config=Config(GIC.parameters), closed=False, from_boot=False, observed=self.observed
        )

    def places(self, kind: str, flag: int, set_: bool) -> list[int]:
        """Rows of a kind, of the virtual interface (flag 1) or the hypervisor's (2), or not."""
        return [i for i, k in enumerate(self.kinds) if k == kind and bool(self.flags[i] & flag) == set_]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return Log(tmp_path_factory.mktemp("gic") / "d")


def serious(run: Run) -> Counter[str]:
    return Counter(f.code.name for f in run.findings if f.code.name != "gic-spurious-ack")


def test_the_whole_log_agrees(log: Log) -> None:
    assert serious(log.run()) == Counter()


@pytest.mark.parametrize(
    ("kind", "flag", "set_", "most"),
    [
        ("gic.eoi", 1, True, 1),  # a guest's EOI: the list register read later says so
        ("gic.ack", 1, True, 1),  # a guest's acknowledge: its EOI ends what was not in service
        ("gic.ack", 1, False, 2),
        ("gic.eoi", 1, False, 2),
        ("gic.dir", 1, False, 2),
        ("gic.cpu_if", 2, True, 4),  # a register write of the hypervisor: each register it fed is one
    ],
)
def test_a_missing_record_is_found_once(kind: str, flag: int, set_: bool, most: int, log: Log) -> None:
    places = log.places(kind, flag, set_)
    chosen = random.Random(kind).sample(places, 6)
    found = [sum(serious(log.run(without=place)).values()) for place in chosen]
    assert max(found) <= most, dict(zip(chosen, found, strict=True))
    if (kind, set_) == ("gic.eoi", True):
        assert sum(found)  # it is not silence that makes them few
