"""Where machines and monitors put what they find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from replay.declare import Code
from replay.events import NIL, NONE

__all__ = ["KEEP", "Doubt", "Evidence", "Finding", "Sink"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One step of the story: when (ns), which canonical event (None: predicted by the model), what it was."""

    t: int
    seq: int | None
    label: str


@dataclass(slots=True)
class Finding:
    """One divergence (spec I.4). NONE/NIL where a field is not given; `code` holds the declaration."""

    code: Code
    severity: str
    t: int
    cpu: int = NONE
    dom: int = NONE
    vcpu: int = NONE
    obj: int = NONE
    tgt: int = NONE
    val: int = NIL
    t_first: int = NIL
    expected: str = ""
    observed: str = ""
    conf: int = 100
    cause: str = ""
    seq: int = NONE  # canonical event at which it was detected, to find its offset
    evidence: tuple[Evidence, ...] = ()
    tags: tuple[str, ...] = ()


#: Findings of one code and severity that are kept; the rest is counted.
KEEP: Final = 10_000

#: May lower the severity of findings in the light of what else is known of them; asked once for each.
Doubt = Callable[[Sequence[Finding]], None]


class Sink:
    """Collects findings of one run.

    `closed` runs drop the codes that spec B says closed runs never raise. A tainted finding is capped at info (U6).
    `keep` bounds memory: the first so many of each code and severity are kept, those beyond are counted in
    `suppressed`, by code and severity. A severity may be lowered later, by lost records or by `doubt`; a code is
    not full before as many have kept theirs, so the worst severity of a run never depends on the limit.
    """

    __slots__ = ("closed", "doubt", "doubted", "findings", "full", "held", "keep", "room", "suppressed")

    def __init__(self, *, closed: bool, keep: int = KEEP, doubt: Doubt | None = None) -> None:
        self.closed: bool = closed
        self.keep: int = keep
        self.doubt: Doubt | None = doubt
        self.doubted: int = 0  # findings, from the first, whose severity was looked at
        self.findings: list[Finding] = []
        self.suppressed: dict[tuple[str, str], int] = {}
        self.held: dict[tuple[str, str], int] = {}
        self.room: dict[tuple[str, str], int] = {}  # how many may be held before it is looked whether it is full
        self.full: set[tuple[str, str]] = set()

    def report(
        self,
        code: Code,
        t: int,
        *,
        cpu: int = NONE,
        dom: int = NONE,
        vcpu: int = NONE,
        obj: int = NONE,
        tgt: int = NONE,
        val: int = NIL,
        t_first: int = NIL,
        expected: str = "",
        observed: str = "",
        severity: str = "",
        conf: int = 100,
        cause: str = "",
        seq: int = NONE,
        evidence: Sequence[Evidence] = (),
        tags: Sequence[str] = (),
    ) -> None:
        """Record one divergence at `t` ns. `severity` overrides the declared one; arguments as in spec I.4."""
        if self.closed and not code.closed:
            return
        level = "info" if "tainted" in tags else severity or code.severity
        if self.keeps(code, level):
            self.findings.append(
                Finding(
                    code, level, t, cpu, dom, vcpu, obj, tgt, val, t_first, expected, observed, conf, cause, seq,
                    tuple(evidence), tuple(tags),
                )
            )  # fmt: skip

    def keeps(self, code: Code, level: str) -> bool:
        """Count one more finding, and say whether it is to be kept."""
        key = (code.name, level)
        if key not in self.full:
            held = self.held.get(key, 0)
            if held >= self.room.get(key, self.keep):
                self.settle()
                held = self.held[key]
            if key not in self.full:
                self.held[key] = held + 1
                return True
        self.suppressed[key] = self.suppressed.get(key, 0) + 1
        return False

    def spared(self, code: Code, severity: str = "") -> bool:
        """Whether one more finding would only be counted, which is done then: no words need be found for it."""
        if (code.name, severity or code.severity) in self.full and (code.closed or not self.closed):
            return not self.keeps(code, severity or code.severity)
        return False

    def settle(self) -> None:
        """Have severities lowered that have to be; then let go what is too much. So at most twice `keep` are held."""
        if self.doubt is not None:
            self.doubt(self.findings[self.doubted :])
        held: dict[tuple[str, str], int] = {}
        kept: list[Finding] = []
        for finding in self.findings:
            key = (finding.code.name, finding.severity)
            count = held.get(key, 0)
            if count < self.keep:
                held[key] = count + 1
                kept.append(finding)
            else:
                self.suppressed[key] = self.suppressed.get(key, 0) + 1
        self.findings[:] = kept
        self.doubted = len(kept)
        self.full = {key for key, count in held.items() if count >= self.keep}
        self.room = {key: count + self.keep for key, count in held.items()}
        self.held = {**dict.fromkeys(self.held, 0), **held}

    def taint(self, t: int) -> None:
        """U6: whatever was found from `t` on is information only, for lost records may explain it."""
        for finding in reversed(self.findings):
            if finding.t < t:
                break
            finding.severity = "info"
            finding.tags = (*finding.tags, "tainted")
        self.full.clear()
        self.room.clear()

    def severities(self) -> Mapping[str, int]:
        """How many findings of each severity were kept."""
        count = {"error": 0, "warn": 0, "info": 0}
        for finding in self.findings:
            count[finding.severity] += 1
        return count
