"""The hot loops execute no more bytecodes than the stored baseline says; and the guard that says so can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import replay.events
from bench import guard

COMPILED = not str(replay.events.__file__).endswith(".py")
pytestmark = pytest.mark.skipif(COMPILED, reason="compiled machines execute no bytecodes")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets that several loops share."""
    return tmp_path_factory.mktemp("guard")


def baseline() -> dict[str, float]:
    found = guard.stored()
    if found is None:
        pytest.skip("no baseline for this version of Python: python -m bench.guard --renew")
    return found


#: Seconds for the kernel's symbols, once.
HEAVY = ("read trace.dat",)


@pytest.mark.parametrize(
    "loop",
    [pytest.param(x, id=x.name, marks=[pytest.mark.slow] if x.name in HEAVY else []) for x in guard.LOOPS],
)
def test_no_loop_got_slower(loop: guard.Loop, scratch: Path) -> None:
    then = baseline()[loop.name]
    now = guard.measure((loop,), scratch)[loop.name]
    limit = then * (1 + guard.TOLERANCE)
    renew = "if it must be: python -m bench.guard --renew"
    assert now <= limit, f"{loop.name}: {now} bytecodes for each {loop.unit}, {then} before; {renew}"


def test_the_baseline_knows_every_loop_and_no_other() -> None:
    assert set(baseline()) == {loop.name for loop in guard.LOOPS}
    assert all(value > 0 for value in baseline().values())


#: Compiled as if it stood in the file of the real one, so that it counts.
EXTRA = """
def rows(self, columns):
    for row in real(self, columns):
        extra = 0
        for _ in (1, 2, 3):
            extra += 1
        yield row
"""


def test_extra_work_for_each_event_is_noticed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = next(x for x in guard.LOOPS if x.name == "machine apic, event by event")
    before = guard.measure((loop,), scratch)
    assert guard.measure((loop,), scratch) == before, "the same work, the same count"
    names: dict[str, Any] = {"real": replay.events.Batch.rows}
    exec(compile(EXTRA, replay.events.__file__, "exec"), names)
    monkeypatch.setattr(replay.events.Batch, "rows", names["rows"])
    (verdict,) = guard.compare(guard.measure((loop,), scratch), before)
    assert verdict.state == "slower" and verdict.bad
    assert verdict.now is not None and verdict.now - before[loop.name] > 20


def test_a_loop_over_records_in_a_reader_is_noticed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads without Python for each record shows it at once when that comes back."""
    import parsers.xentrace.reader as reader

    loop = next(x for x in guard.LOOPS if x.name == "read xentrace")
    before = guard.measure((loop,), scratch)
    source = """
def chunks(self):
    for chunk in real(self):
        for table in chunk.tables.values():
            for _ in range(table.num_rows):
                pass
        yield chunk
"""
    names: dict[str, Any] = {"real": reader.XentraceReader.chunks}
    exec(compile(source, reader.__file__, "exec"), names)
    monkeypatch.setattr(reader.XentraceReader, "chunks", names["chunks"])
    (verdict,) = guard.compare(guard.measure((loop,), scratch), before)
    assert verdict.bad


def test_what_the_guard_says() -> None:
    then = {"a": 100.0, "b": 100.0, "c": 100.0, "gone": 1.0}
    found = {v.name: v.state for v in guard.compare({"a": 104.9, "b": 105.1, "c": 90.0, "new": 1.0}, then)}
    assert found == {"a": "same", "b": "slower", "c": "faster", "new": "new", "gone": "gone"}
    bad = [v.name for v in guard.compare({"a": 104.9, "b": 105.1, "c": 90.0, "new": 1.0}, then) if v.bad]
    assert bad == ["b", "new", "gone"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The command with one loop and a baseline of its own."""
    monkeypatch.setattr(guard, "LOOPS", guard.LOOPS[:1])
    monkeypatch.setattr(guard, "BASELINE", tmp_path / "baseline.json")
    loops = guard.LOOPS
    real = guard.measure
    monkeypatch.setattr(guard, "measure", lambda: real(loops))
    yield tmp_path / "baseline.json"


def test_the_command_fails_and_renews(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard.main(["--renew"]) == 0
    assert guard.main([]) == 0
    text = small.read_text()
    value = next(iter((guard.stored() or {}).values()))
    small.write_text(text.replace(str(value), str(value / 2)))
    capsys.readouterr()
    assert guard.main([]) == 1
    assert "slower" in capsys.readouterr().out
