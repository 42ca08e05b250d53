"""The flag word of a text line (`d.h1.`) as the numbers that the binary record holds (kernel: trace_print_lat_fmt)."""

from __future__ import annotations

__all__ = ["decode_flags"]

IRQS_OFF, NEED_RESCHED_LAZY, NEED_RESCHED = 0x01, 0x02, 0x04
HARDIRQ, SOFTIRQ, PREEMPT_RESCHED, NMI, BH_OFF = 0x08, 0x10, 0x20, 0x40, 0x80

IRQS = {".": 0, "d": IRQS_OFF, "D": IRQS_OFF | BH_OFF, "b": BH_OFF, "X": 0x02}
RESCHED = {
    ".": 0,
    "N": NEED_RESCHED | PREEMPT_RESCHED,
    "n": NEED_RESCHED,
    "p": PREEMPT_RESCHED,
    "l": NEED_RESCHED_LAZY,
    "L": NEED_RESCHED_LAZY | PREEMPT_RESCHED,
    "b": NEED_RESCHED | NEED_RESCHED_LAZY,
    "B": NEED_RESCHED | NEED_RESCHED_LAZY | PREEMPT_RESCHED,
}
CONTEXT = {".": 0, "Z": NMI | HARDIRQ, "z": NMI, "H": HARDIRQ | SOFTIRQ, "h": HARDIRQ, "s": SOFTIRQ}
LAZY = {".": 0, "l": NEED_RESCHED_LAZY, "L": NEED_RESCHED_LAZY}

#: Columns by width: kernels before 5.16, since 5.16, RT patches (with lazy preemption). "-" is not kept.
LAYOUTS = {4: "irxp", 5: "irxpm", 6: "irlxp-", 7: "irlxp-m", 8: "irlxp-m-"}


def decode_flags(word: str) -> tuple[int, int] | None:
    """(common_flags, common_preempt_count) of a flag word; None when it is not one.

    A depth shown as `f` means 15 or more. `#FLAGS:DEPTH` holds the two numbers (decimal, hexadecimal).
    """
    if word.startswith("#"):  # the option `verbose`: both numbers as they are, the depth cut to its byte
        number, _, count = word[1:].partition(":")
        return int(number) & 0xFF, int(count, 16) & 0xFF
    layout = LAYOUTS.get(len(word))
    if layout is None:
        return None
    flags = preempt = 0
    for kind, letter in zip(layout, word, strict=True):
        table = {"i": IRQS, "r": RESCHED, "x": CONTEXT, "l": LAZY}.get(kind)
        if table is not None:
            if letter not in table:
                return None
            flags |= table[letter]
            continue
        if letter not in ".0123456789abcdef":
            return None
        depth = 0 if letter == "." else int(letter, 16)
        preempt |= depth if kind == "p" else depth << 4 if kind == "m" else 0
    return flags, preempt
