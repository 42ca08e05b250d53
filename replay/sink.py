"""Where machines and monitors put what they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replay.declare import Code
from replay.events import NIL, NONE

__all__ = ["Evidence", "Finding", "Sink"]


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


class Sink:
    """Collects findings of one run.

    `closed` runs drop the codes that spec B says closed runs never raise. A tainted finding is capped at info (U6).
    `limit` bounds memory: per code, findings beyond it are counted in `suppressed`, not kept.
    """

    __slots__ = ("closed", "findings", "limit", "suppressed", "totals")

    def __init__(self, *, closed: bool, limit: int = 100_000) -> None:
        self.closed: bool = closed
        self.limit: int = limit
        self.findings: list[Finding] = []
        self.totals: dict[str, int] = {}
        self.suppressed: dict[str, int] = {}

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
        total = self.totals.get(code.name, 0) + 1
        self.totals[code.name] = total
        if total > self.limit:
            self.suppressed[code.name] = total - self.limit
            return
        level = "info" if "tainted" in tags else severity or code.severity
        self.findings.append(
            Finding(
                code, level, t, cpu, dom, vcpu, obj, tgt, val, t_first, expected, observed, conf, cause, seq,
                tuple(evidence), tuple(tags),
            )
        )  # fmt: skip

    def severities(self) -> Mapping[str, int]:
        """How many findings of each severity were kept."""
        count = {"error": 0, "warn": 0, "info": 0}
        for finding in self.findings:
            count[finding.severity] += 1
        return count
