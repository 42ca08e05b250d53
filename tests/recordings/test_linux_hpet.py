"""Kprobes on the HPET and on clock event devices: deadlines, and whose channel it is."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from parsers.open import open_recording
from tests.recordings.test_linux_binding import codes, replayed, stored
from tests.shared import shared_path
from tracetool.store import Dataset

MS = 1_000_000
IRQ = {0: 26, 1: 27}
EVT = {0: 0xFFFF888003A40000, 1: 0xFFFF888003A40100}
LAPIC = {0: 0xFFFF88807DC1E100, 1: 0xFFFF88807DD1E100}


def enters(dataset: Dataset) -> pl.DataFrame:
    return dataset.events().filter(pl.col("kind") == "idle.enter").select("t_ns", "cpu", "val").collect()


@pytest.mark.parametrize(("folder", "known"), [("linux-6.1", 710), ("linux-6.1-xen-dom0", 303)])
def test_probed_deadlines_are_those_of_the_timers(tmp_path: Path, folder: str, known: int) -> None:
    """The same real recording once without its timers and once without the probe: two ways to one deadline."""
    raw = open_recording(shared_path(f"recordings/{folder}/10-kprobes.txt.zst")).stream.read()
    deadlines = []
    for name, without in (("both", b"\0"), ("probes", b" hrtimer_start: "), ("timers", b" clockevents_program: ")):
        path = tmp_path / f"{name}.txt"
        path.write_bytes(b"\n".join(line for line in raw.split(b"\n") if without not in line))
        deadlines.append(enters(stored(path, tmp_path / name)))
    both, probes, timers = deadlines
    assert probes["val"].count() == timers["val"].count() == known
    assert both.equals(probes)
    assert both.equals(timers)


class Log:
    """ftrace text of two CPUs that sleep and are woken by their HPET channels; CLOCK_MONOTONIC is 2 s behind."""

    def __init__(self, *, names: bool, inner: bool, entries: bool) -> None:
        self.names = names
        self.inner = inner
        self.entries = entries
        self.lines: list[tuple[int, int, str]] = []

    def add(self, t: int, cpu: int, text: str) -> None:
        self.lines.append((t, cpu, text))

    def sleep(self, t: int, cpu: int, until: int, woken: int, taken_on: int | None = None) -> None:
        """Armed, idle, and the channel's interrupt at `woken`, perhaps on another CPU (which slept as well)."""
        expires = until - 2_000 * MS
        dev = EVT[cpu] if self.inner or self.names else LAPIC[cpu]
        name = f" name=hpet{cpu + 3}" if self.names else " name=(fault)"
        self.add(t, cpu, f"cev: (clockevents_program_event+0x0/0x100) dev={dev:#x} expires={expires} force=0{name}")
        if self.inner:
            self.add(t + 2_000, cpu, f"nx: (hpet_clkevt_set_next_event+0x0/0x50) delta=99 evt={EVT[cpu]:#x}")
        self.add(t + 5_000, cpu, f"cpu_idle: state=1 cpu_id={cpu}")
        at = cpu if taken_on is None else taken_on
        if self.entries:
            self.add(woken, at, f"irq_handler_entry: irq={IRQ[cpu]} name=hpet{cpu + 3}")
        else:
            self.add(woken, at, f"msi: (hpet_msi_interrupt_handler+0x0/0x30) irq={IRQ[cpu]} dev={EVT[cpu]:#x}")
        # The tick's timer, which ties the clocks.
        now = woken - 2_000 * MS
        self.add(woken + 1_000, at, f"hrtimer_expire_entry: hrtimer=0000000012345678 function=tick now={now}")
        if self.entries:
            self.add(woken + 3_000, at, f"irq_handler_exit: irq={IRQ[cpu]} ret=handled")
        self.add(woken + 9_000, cpu, f"cpu_idle: state=4294967295 cpu_id={cpu}")

    def write(self, path: Path) -> Path:
        head = "# tracer: nop\n#\n#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n"
        rows = [
            f"          <idle>-0       [{cpu:03d}] d..1. {t // 10**9}.{t % 10**9 // 1000:06d}: {text}"
            for t, cpu, text in sorted(self.lines)
        ]
        path.write_text(head + "\n".join(rows) + "\n")
        return path


WAYS = [
    pytest.param(True, False, True, id="names"),
    pytest.param(False, True, True, id="set-next-event"),
    pytest.param(False, True, False, id="msi-handler"),
]


def nights(log: Log, wrong: int = -1) -> Log:
    """Forty sleeps of both CPUs, each woken by its own channel at its deadline; `wrong`: that one's is taken by the
    other CPU, while both sleep."""
    t = 3_000 * MS
    for n in range(40):
        for cpu in (0, 1):
            until = t + (4 if cpu else 6) * MS
            log.sleep(t + cpu * 100_000, cpu, until, until + 20_000, 0 if n == wrong and cpu else None)
        t += 10 * MS
    return log


@pytest.mark.parametrize(("names", "inner", "entries"), WAYS)
def test_channels_of_a_healthy_recording(tmp_path: Path, names: bool, inner: bool, entries: bool) -> None:
    log = nights(Log(names=names, inner=inner, entries=entries))
    dataset = stored(log.write(tmp_path / "log.txt"), tmp_path)
    numbers = (3, 4) if names or entries else (0, 1)
    assert dataset.manifest["facts"]["hpet_owners"] == {f"hpet{numbers[0]}": 0, f"hpet{numbers[1]}": 1}
    frame = dataset.events().filter(pl.col("kind") == "hpet.program").collect()
    assert frame.height == 80
    assert frame["cpu"].equals(frame["tgt"].cast(frame["cpu"].dtype))
    assert set(frame.select("cpu", "obj").unique().iter_rows()) == {(0, numbers[0]), (1, numbers[1])}
    late = frame["val"] - frame["t_ns"]
    assert late.min() > 3 * MS
    assert late.max() < 7 * MS
    run = replayed(dataset, "current", systems=("hpet",))["hpet current"]
    assert [f for f in run["findings"] if f["severity"] != "info"] == []
    assert run["metrics"]["hpet_irqs"] == 80
    states = {c["rule"]: c["state"] for c in run["coverage"]}
    assert states["hpet-wrong-cpu"] == "checked"
    assert states["hpet-orphan-member"] == "blind"


@pytest.mark.parametrize(("names", "inner", "entries"), WAYS)
def test_a_channel_on_the_wrong_cpu_is_certain(tmp_path: Path, names: bool, inner: bool, entries: bool) -> None:
    log = nights(Log(names=names, inner=inner, entries=entries), wrong=20)
    run = replayed(stored(log.write(tmp_path / "log.txt"), tmp_path), "current", systems=("hpet",))["hpet current"]
    found = [f for f in run["findings"] if f["code"] == "hpet-wrong-cpu"]
    assert [(f["severity"], f["cpu"], f["val"], f["confidence"]) for f in found] == [("error", 0, 1, 100)]
    assert codes(run)["hpet-wrong-cpu"] == 1


def test_the_broadcast_device_is_no_channel(tmp_path: Path) -> None:
    """The legacy comparator wakes many: both CPUs program it."""
    log = nights(Log(names=False, inner=True, entries=True))
    shared = [(t, c, x.replace(f"{EVT[1]:#x}", f"{EVT[0]:#x}")) for t, c, x in log.lines]
    log.lines = shared
    dataset = stored(log.write(tmp_path / "log.txt"), tmp_path)
    assert dataset.events().filter(pl.col("kind") == "hpet.program").collect().height == 0
