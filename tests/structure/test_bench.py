"""The benches run, and what they generate is consistent. Nothing here asserts a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import big, machines, parse
from parsers.open import open_recording
from parsers.recording import ReadOptions
from parsers.xentrace.reader import XentraceReader
from replay.events import rows
from tests.shared import SAMPLES

SAMPLE = SAMPLES / "xen-2l-dom0-idle.xentrace"


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("big") / "big.xentrace"
    big.main([str(SAMPLE), "600K", str(target)])
    return target


def test_a_big_recording_is_whole_and_in_order(looped: Path) -> None:
    with open_recording(str(looped)) as opened:
        reader = XentraceReader(opened.stream, ReadOptions(source="big"))
        chunks = list(reader.chunks())
    assert looped.stat().st_size >= 600_000
    assert reader.accounting.parsed == reader.accounting.total and reader.accounting.skipped == 0
    assert [n.code for c in chunks for n in c.notes if n.severity != "info"] == []


def test_no_vcpu_jumps_at_a_seam(looped: Path) -> None:
    """Every change of a vCPU's state starts from the state in which the one before left it."""
    state: dict[tuple[int, int], int] = {}
    changes = 0
    with open_recording(str(looped)) as opened:
        for chunk in XentraceReader(opened.stream, ReadOptions(source="big")).chunks():
            table = chunk.tables.get("TRC_SCHED_RUNSTATE_CHANGE")
            if table is None:
                continue
            columns = (table[name].to_pylist() for name in ("dom", "vcpu", "old_state", "new_state"))
            for dom, vcpu, old, new in zip(*columns, strict=True):
                assert state.get((dom, vcpu), old) == old
                state[dom, vcpu] = new
                changes += 1
    assert changes > 1000


def test_sizes_are_decimal() -> None:
    assert big.parse_size("300M") == 300_000_000 and big.parse_size("7") == 7


def test_parse_counts_every_record() -> None:
    assert parse.parse(str(SAMPLE)) > 1000


@pytest.mark.parametrize(("system", "policy", "mix"), [(s, p, m) for _, s, p, m, *_ in machines.MIXES])
def test_healthy_mixes_give_no_findings(system: str, policy: str, mix: object) -> None:
    """The loads measure the common case: nothing in them may be a divergence."""
    rate, findings = machines.rate(system, policy, mix(5_000), 1)  # type: ignore[operator]
    assert rate > 0 and findings == 0


@pytest.mark.parametrize(("mix", "loop", "columns"), [m[3:] for m in machines.MIXES])
def test_the_prototypes_agree_that_the_mixes_are_healthy(mix: object, loop: object, columns: tuple[str, ...]) -> None:
    """They are what machines are measured against, so they have to keep the state too."""
    assert loop(rows(mix(5_000), columns)) == 0  # type: ignore[operator]
    assert loop(reversed(list(rows(mix(5_000), columns)))) > 0  # type: ignore[operator]
