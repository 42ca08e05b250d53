"""/proc/interrupts, /proc/timer_list and the output of `lsevtchn`."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from parsers.debugkeys.rows import Field, Row, TextReader, convert, table
from parsers.recording import ClockModel

__all__ = ["InterruptsReader", "LsevtchnReader", "TimerListReader"]

_F = Field


class InterruptsReader(TextReader):
    """/proc/interrupts, also several copies one after the other (`snapshot`).

    `interrupt`: one row for each line; `interrupt_count`: one row for each line and CPU (`cpu`), the same `seq`.
    """

    format: ClassVar[str] = "proc-interrupts"
    RECOGNISE = re.compile(rb"\A\s+CPU\d+(?:[ \t]+CPU\d+)*[ \t]*\r?\n")
    LINE_BYTES = 1 << 16  # eleven bytes for each CPU
    TABLES = {
        declared.name: (declared, kinds)
        for declared, kinds in (
            table("interrupt_cpus", "the heading", _F("cpus", "s", "CPUs of the columns, in order")),
            table(
                "interrupt",
                "a line of /proc/interrupts",
                _F("label", "s", "IRQ number or name of the line"),
                _F("irq", "u32", "IRQ number; null for LOC, RES, IPI0 …"),
                _F("total", "u64", "sum over the CPUs"),
                _F("chip", "s", "interrupt chip"),
                _F("hwirq", "u64", "number at the chip (pin, MSI index, INTID)"),
                _F("flow", "s", "edge, fasteoi, Level, ioapic-level, virq …"),
                _F("actions", "s", "names of the handlers, or the line's explanation"),
            ),
            table(
                "interrupt_count",
                "interrupts of a line on one CPU (`cpu`; null: not per CPU)",
                _F("label", "s", "IRQ number or name of the line"),
                _F("irq", "u32", "IRQ number"),
                _F("count", "u64", "interrupts since boot"),
            ),
        )
    }
    _HEAD = re.compile(r"^\s*CPU\d+(?:\s+CPU\d+)*\s*$")
    _LINE = re.compile(r"^\s*(?P<label>[A-Za-z0-9_]+):\s+(?P<rest>\d.*)$")
    # chip, then "2-edge", "25 Level" or "-virq", then the names
    _CHIP = re.compile(r"^(?P<chip>\S+)\s+(?:(?P<hwirq>\d+)(?:-|\s+)|-)(?P<flow>\S+)(?:\s+(?P<actions>\S.*))?$")

    def start(self, head: bytes) -> None:
        """No copy has been seen yet."""
        self._cpus: list[int] = []
        self._snapshot = -1

    def line(self, text: str) -> list[Row]:
        """Rows of one line."""
        if self._HEAD.match(text):
            self._cpus = [int(word[3:]) for word in text.split()]
            self._snapshot += 1
            return [Row("interrupt_cpus", {"snapshot": self._snapshot, "cpus": " ".join(map(str, self._cpus))})]
        match = self._LINE.match(text.rstrip())
        if not match or self._snapshot < 0:
            return []
        label, rest = match["label"], match["rest"]
        words = rest.split(None, len(self._cpus))
        counts: list[str] = []
        while words and len(counts) < len(self._cpus) and words[0].isdigit():
            counts.append(words.pop(0))
        single = len(counts) == 1 < len(self._cpus)  # ERR, MIS: one number for the machine
        if not counts or (not single and len(counts) != len(self._cpus)):
            return []
        values: dict[str, str | None] = {"label": label, "irq": label if label.isdigit() else None}
        values["total"] = str(sum(map(int, counts)))
        tail = " ".join(words)
        chip = self._CHIP.match(tail) if label.isdigit() else None
        values |= chip.groupdict() if chip else {"actions": tail or None}
        base: dict[str, Any] = {"snapshot": self._snapshot}
        rows = [Row("interrupt", base | convert(self.TABLES["interrupt"][1], values))]
        kinds = self.TABLES["interrupt_count"][1]
        for cpu, count in zip([None] if single else self._cpus, counts, strict=True):
            rows.append(Row("interrupt_count", base | convert(kinds, values | {"count": count}), cpu))
        return rows


class TimerListReader(TextReader):
    """/proc/timer_list.

    `hrtimer`: the active timers; `clock_event_device`: one row for each tick device; `timer_value`: every other value
    with the CPU and the object it stands under. `tsc` is the time of the snapshot (CLOCK_MONOTONIC, ns).
    """

    format: ClassVar[str] = "timer-list"
    RECOGNISE = re.compile(rb"^Timer List Version: v", re.M)
    TABLES = {
        declared.name: (declared, kinds)
        for declared, kinds in (
            table("timer_heading", "a heading line", _F("text", "s", "the line")),
            table(
                "timer_value",
                "a value of the list",
                _F("object", "s", "list, cpu, clock N, broadcast or the clock event device"),
                _F("name", "s", "name of the value"),
                _F("number", "u64", "the value, if it is a decimal number"),
                _F("text", "s", "the value as printed"),
            ),
            table(
                "hrtimer",
                "an active high-resolution timer of a CPU",
                _F("clock", "u8", "clock base"),
                _F("index", "u32", "position in the queue"),
                _F("address", "s", "hashed address"),
                _F("function", "s", "callback"),
                _F("state", "x8", "state bits"),
                _F("soft_ns", "i64", "earliest expiry, in the time of its clock base", "ns"),
                _F("hard_ns", "i64", "latest expiry", "ns"),
                _F("in_ns", "i64", "hard expiry relative to the snapshot", "ns"),
            ),
            table(
                "clock_event_device",
                "the clock event device of a CPU (`cpu`), or of the broadcast (`cpu` null)",
                _F("role", "s", "broadcast, per-cpu or wakeup"),
                _F("tick_mode", "u8", "0 periodic, 1 one-shot"),
                _F("device", "s", "name of the device"),
                _F("mode", "u8", "state: 0 detached, 1 shutdown, 2 periodic, 3 one-shot, 4 one-shot stopped"),
                _F("next_event_ns", "i64", "programmed expiry (CLOCK_MONOTONIC); 2^63-1 = never", "ns"),
                _F("handler", "s", "event handler"),
                _F("set_next_event", "s", "function that programs it"),
                _F("retries", "u64", "programming retries"),
                _F("min_delta_ns", "u64", "", "ns"),
                _F("max_delta_ns", "u64", "", "ns"),
                _F("mult", "u64", "ns → ticks: multiplier"),
                _F("shift", "u8", "ns → ticks: shift"),
            ),
        )
    }
    _TIMER = re.compile(r"^ #(?P<index>\d+): <(?P<address>[^>]*)>, (?P<function>[^,]+), S:(?P<state>[0-9a-f]+)")
    _EXPIRES = re.compile(
        r"^ # expires at (?P<soft_ns>-?\d+)-(?P<hard_ns>-?\d+) nsecs \[in -?\d+ to (?P<in_ns>-?\d+) nsecs\]"
    )
    _VALUE = re.compile(r"^\s*(?P<name>\.?[A-Za-z_]\w*)\s*:\s*(?P<text>\S.*?)?(?:\s+nsecs)?\s*$")
    _MEMBERS = {
        "mode": "mode",
        "next_event": "next_event_ns",
        "event_handler": "handler",
        "set_next_event": "set_next_event",
        "retries": "retries",
        "min_delta_ns": "min_delta_ns",
        "max_delta_ns": "max_delta_ns",
        "mult": "mult",
        "shift": "shift",
    }

    def start(self, head: bytes) -> None:
        """Takes the time of the snapshot from the head."""
        self._cpu: int | None = None
        self._object = "list"
        self._snapshot = -1
        self._timer: Row | None = None
        self._device: Row | None = None
        self._tick: str | None = None
        self._role = "per-cpu"
        self._now: int | None = None
        now = re.search(rb"^now at (\d{1,18}) nsecs", head, re.M)
        if now:
            self.clock = ClockModel("ns", 1e9, int(now[1]), "ns", "now at", doc="CLOCK_MONOTONIC of the snapshot")

    def _time(self, row: Row) -> int:
        return max((row.tsc or 0) - self.clock.tsc0, 0)

    def _done(self) -> list[Row]:
        rows = [row for row in (self._timer, self._device) if row is not None]
        self._timer = self._device = None
        return rows

    def finish(self) -> list[Row]:
        """The timer or device that the file ends with."""
        return self._placed(self._done())

    def line(self, text: str) -> list[Row]:
        """Rows of one line; a device's row is given when the device ends."""
        if not text.strip():
            return [Row("timer_heading", {"snapshot": max(self._snapshot, 0), "text": ""})]
        return self._placed(self._parse(text))

    def _placed(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            row.values.setdefault("snapshot", max(self._snapshot, 0))
            row.tsc = self._now if row.tsc is None else row.tsc
            row.cpu = self._cpu if row.cpu is None and row.table != "clock_event_device" else row.cpu
        return rows

    def _parse(self, text: str) -> list[Row]:
        heading = Row("timer_heading", {"text": text[:4096]})
        if text.startswith("Timer List Version:"):
            self._snapshot += 1
            self._cpu, self._object = None, "list"
            return [*self._done(), heading]
        if match := re.match(r"now at (\d{1,18}) nsecs", text):
            self._now = int(match[1])
            return [heading]
        if match := re.match(r"cpu: (\d{1,5})$", text):
            self._cpu, self._object = int(match[1]), "cpu"
            return [*self._done(), heading]
        if match := re.match(r" clock (\d{1,3}):$", text):
            self._object = f"clock {match[1]}"
            return [*self._done(), heading]
        if text == "active timers:":
            return [heading]
        if match := self._TIMER.match(text):
            done = self._done()
            clock = self._object.removeprefix("clock ")
            kinds = self.TABLES["hrtimer"][1]
            values = convert(kinds, {**match.groupdict(), "clock": clock if clock.isdigit() else None})
            self._timer = Row("hrtimer", values, line=self._line)
            return [*done, heading]
        if match := self._EXPIRES.match(text):
            if self._timer is None:
                return []
            self._timer.values |= convert(self.TABLES["hrtimer"][1], match.groupdict())
            return [*self._done(), heading]
        if match := re.match(r"Tick Device: mode:\s+(\d+)", text):
            done = self._done()
            self._tick, self._cpu, self._object = match[1], None, "tick device"
            return [*done, heading]
        if match := re.match(r"(Broadcast device|(?:Per CPU|Wakeup) [Dd]evice:\s+.*)$", text):
            done = self._done() if match[1].startswith("Wakeup") else []
            self._role = {"B": "broadcast", "P": "per-cpu", "W": "wakeup"}[text[0]]
            if self._role == "per-cpu":
                self._cpu = int(text.split(":")[1])
            return [*done, heading]
        if match := re.match(r"Clock Event Device: (.*)$", text):
            done = self._done()
            self._object = match[1][:255]
            values = convert(
                self.TABLES["clock_event_device"][1], {"device": match[1], "role": self._role, "tick_mode": self._tick}
            )
            self._device = Row("clock_event_device", values, self._cpu, self._line)
            return [*done, heading]
        match = self._VALUE.match(text)
        if match is None:
            return []
        name, value = match["name"], match["text"]
        if name.startswith("tick_broadcast"):
            self._object, self._cpu = "broadcast", None
        column = self._MEMBERS.get(name)
        kinds = self.TABLES["clock_event_device"][1]
        if self._device is not None and column is not None:
            self._device.values |= convert(kinds, {column: value})
        number = int(value) if value is not None and value.isdigit() and len(value) < 20 else None
        if number is not None and number >= 1 << 64:
            number = None
        return [Row("timer_value", {"object": self._object, "name": name, "number": number, "text": value})]


class LsevtchnReader(TextReader):
    """The output of `lsevtchn DOM`: one row for each port. Several outputs one after the other count `snapshot`."""

    format: ClassVar[str] = "lsevtchn"
    RECOGNISE = re.compile(rb"\A\s*\d+: VCPU \d+: ")
    TABLES = {
        declared.name: (declared, kinds)
        for declared, kinds in (
            table(
                "lsevtchn",
                "an event channel as the toolstack sees it",
                _F("port", "u32", "port"),
                _F("vcpu", "u16", "vCPU notified"),
                _F("state", "s", "interdomain, unbound, pirq, virq, ipi"),
                _F("remote_dom", "u16", "the other domain"),
                _F("remote_port", "u32", "its port"),
                _F("pirq", "u32", "pirq"),
                _F("virq", "u16", "virq"),
                _F("ssid", "s", "security label"),
            ),
        )
    }
    _LINE = re.compile(
        r"^\s*(?P<port>\d+): VCPU (?P<vcpu>\d+): (?:"
        r"(?P<interdomain>Interdomain) \(Connected\) - Remote Domain (?P<d1>\d+), Port (?P<remote_port>\d+)"
        r"|(?P<unbound>Interdomain) \(Waiting connection\) - Remote Domain (?P<d2>\d+)"
        r"|Physical IRQ (?P<pirq>\d+)|Virtual IRQ (?P<virq>\d+)|(?P<ipi>IPI))(?: \[(?P<ssid>[^\]]*)\])?\s*$"
    )

    def start(self, head: bytes) -> None:
        """No output has been seen yet."""
        self._last = 1 << 32
        self._snapshot = -1

    def line(self, text: str) -> list[Row]:
        """The row of one line."""
        match = self._LINE.match(text)
        if match is None:
            return []
        groups = match.groupdict()
        state = next(name for name in ("interdomain", "unbound", "pirq", "virq", "ipi") if groups[name] is not None)
        values = convert(
            self.TABLES["lsevtchn"][1], {**groups, "state": state, "remote_dom": groups["d1"] or groups["d2"]}
        )
        if values["port"] <= self._last:
            self._snapshot += 1
        self._last = values["port"]
        return [Row("lsevtchn", {"snapshot": self._snapshot} | values)]
