"""Words and numbers for people: times, sizes, objects; strings of a guest made harmless."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "Times", "clean", "count", "hexa", "lines", "noun", "number", "percent", "plural", "size", "where",
]  # fmt: skip

#: Unicode categories that control rather than print: C0/C1, bidi and zero-width, surrogates, separators, unassigned.
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

#: What `obj` is, by system; the prefix of a code may say it better.
_OBJECT: Final[Mapping[str, str]] = {
    "hpet": "HPET channel", "mwait": "CPU", "callback": "GSI", "via": "GSI", "vgic": "INTID", "gic": "INTID",
    "irqflow": "irq", "flow": "irq", "evtchn": "port", "fifo": "port", "lapic": "vector", "apic": "vector",
    "ioapic": "IOAPIC pin", "hwhpet": "HPET comparator", "isr": "vector", "irqdesc": "irq",
}  # fmt: skip

#: Codes and kinds of events whose object is not what their prefix says but a vector.
_OTHER_OBJECT: Final[Mapping[str, str]] = dict.fromkeys(
    (
        "via.inject", "via.eoi", "via.isr_begin", "via.isr_end", "via-spurious-inject", "via-inject-storm",
        "via-late-delivery", "idle.break", "ioapic.eoi", "ioapic.message",
    ), "vector",
)  # fmt: skip


def clean(text: object, limit: int = 4000) -> str:
    """Text with every character that controls a terminal or reorders a line written as an escape.

    Recordings carry task and file names that a guest chose. `limit` (characters) bounds what one string may take.
    """
    raw = str(text)
    if len(raw) > limit:
        raw = raw[:limit] + "…"
    if raw.isprintable():  # all that is hidden is not; some spaces neither
        return raw
    return "".join(_visible(c) if unicodedata.category(c) in _HIDDEN else c for c in raw)


def _visible(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def lines(text: object, width: int, *, indent: str = "", first: str | None = None) -> list[str]:
    """Text wrapped to `width` columns, cleaned; words that are too long are broken."""
    return textwrap.wrap(
        clean(text), max(width, 12), initial_indent=indent if first is None else first, subsequent_indent=indent,
        break_long_words=True, break_on_hyphens=False,
    )  # fmt: skip


def number(value: object) -> str:
    """A number with thin groups of thousands; anything else as text."""
    if isinstance(value, bool) or value is None:
        return "–" if value is None else "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if isinstance(value, float):
        return f"{value:,.6g}".replace(",", "\u202f")
    return clean(value)


def plural(n: int, one: str, many: str = "") -> str:
    """`1 error`, `2 errors`."""
    return f"{number(n)} {one if n == 1 else many or one + 's'}"


def count(severities: Mapping[str, int]) -> str:
    """`2 errors, 1 warning`, or `nothing`."""
    names = (("error", "error"), ("warn", "warning"), ("info", "remark"))
    parts = [plural(severities[key], word) for key, word in names if severities.get(key)]
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "nothing"


def size(value: object) -> str:
    """Bytes, with a rounded unit behind."""
    if not isinstance(value, int):
        return number(value)
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= scale:
            return f"{number(value)} bytes ({value / scale:.1f} {unit})"
    return plural(value, "byte")


def percent(part: float, whole: float) -> str:
    """A share; never rounded up to 100 % or down to 0 %."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.0f} %" if share in (0, 100) else f"{share:.1f} %"


def hexa(value: int) -> str:
    """A register value."""
    return f"{value:#x}" if value >= 0 else str(value)


class Times:
    """Writes times of a dataset: ns, or raw ticks when the recording gives no frequency."""

    def __init__(self, unit: str = "ns") -> None:
        self.ticks = unit != "ns"

    def at(self, t: int | None) -> str:
        """A moment, exact."""
        if t is None:
            return "unknown"
        if self.ticks:
            return f"{number(t)} ticks"
        sign = "-" if t < 0 else ""
        return f"{sign}{abs(t) // 1_000_000_000}.{abs(t) % 1_000_000_000:09d} s"

    def span(self, dt: int | None) -> str:
        """A duration, four digits."""
        if dt is None:
            return "unknown"
        if self.ticks:
            return f"{number(dt)} ticks"
        for unit, scale in (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1_000)):
            if abs(dt) >= scale:
                return f"{dt / scale:.4g} {unit}" if abs(dt) < 1000 * scale else f"{number(round(dt / scale))} {unit}"
        return f"{dt} ns"

    def relative(self, dt: int) -> str:
        """A duration with its sign."""
        return "0" if dt == 0 else ("+" if dt > 0 else "−") + self.span(abs(dt))

    def axis(self, extent: int) -> tuple[str, int]:
        """(unit, how many ns it has) that suits an axis of this extent."""
        if self.ticks:
            return "ticks", 1
        for unit, scale in (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1_000)):
            if extent >= 2 * scale:
                return unit, scale
        return "ns", 1


def noun(name: str, system: str = "") -> str:
    """What `obj` is called for a code or an event kind."""
    prefix = name.replace(".", "-").partition("-")[0]
    return _OTHER_OBJECT.get(name) or _OBJECT.get(prefix) or _OBJECT.get(system) or "object"


def where(finding: Mapping[str, Any], system: str = "") -> str:
    """The object of a finding in words: `HPET channel 0, CPU 1`."""
    parts = []
    if finding.get("obj") is not None:
        word = noun(str(finding.get("code", "")), system)
        obj = finding["obj"]
        parts.append(f"{word} {hexa(obj) if word == 'vector' and isinstance(obj, int) else obj}")
    if finding.get("vcpu") is not None:
        dom = finding.get("dom")
        parts.append(f"d{'?' if dom is None else dom}v{finding['vcpu']}")
    elif finding.get("dom") is not None:
        parts.append(f"domain {finding['dom']}")
    if finding.get("cpu") is not None:
        parts.append(f"CPU {finding['cpu']}")
    return clean(", ".join(parts) or "the whole system")
