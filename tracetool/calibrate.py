"""Whether a what-if is evidence: the recorded policy's own what-if against the recording (spec 0.5).

A run that is not calibrated predicts nothing: its findings are kept as information, its verdict is `inconclusive`, and
it says which stimulus or number is to blame.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from replay.bodies import Measured
from replay.coverage import CHECKED_FROM, Observation
from replay.declare import System
from replay.driver import Run
from replay.effects import Effects
from replay.generic import UNCALIBRATED
from replay.sink import Finding

__all__ = ["TAG", "TOLERANCE", "blind_reason", "calibration", "horizon", "inferred", "withdraw"]

#: Share by which a what-if run of the recorded policy may miss the recording's numbers.
TOLERANCE: Final = 0.25
#: Tag of the findings of a run that is no evidence.
TAG: Final = "uncalibrated"
#: Such findings have this confidence at most.
CONF: Final = 25


def blind_reason(system: System, observed: Collection[str], measured: Measured) -> str:
    """Why the system's what-ifs are about nothing: the stimulus that the recording does not show; "" when all are."""
    if measured.blind:
        return measured.blind
    for need in system.drives:
        if not any(kind in observed for kind in need.split("|")):
            return f"{need.replace('|', ' or ')} is not recorded"
    return ""


def inferred(system: System, observed: Mapping[str, Observation]) -> bool:
    """Whether a stimulus was only concluded from other records."""
    for need in system.drives:
        best = max((observed[kind].conf for kind in need.split("|") if kind in observed), default=0)
        if best < CHECKED_FROM:
            return True
    return False


def calibration(
    system: System, recorded: Mapping[str, int], predicted: Mapping[str, int], measured: Measured, *, blind: str
) -> dict[str, Any]:
    """Recorded and predicted numbers of the recorded policy: `state`, `tolerance`, `metrics` (name to the two numbers),
    `reasons` (why it is uncalibrated), `assumptions`."""
    pairs = {
        name: (recorded[name], predicted[name])
        for name in system.calibrate
        if not blind and name in recorded and name in predicted
    }
    off = [name for name, (a, b) in pairs.items() if abs(a - b) > TOLERANCE * max(a, 1)]
    reasons = [blind] if blind else []
    reasons += [f"{name}: recorded {pairs[name][0]}, predicted {pairs[name][1]}" for name in off]
    if not reasons and not pairs:
        reasons.append("no number of the recording can be compared")
    elif not reasons and not any(a for a, _ in pairs.values()):
        reasons.append("nothing happened in the recording that could be compared")
    return {
        "state": "uncalibrated" if reasons else "calibrated",
        "tolerance": TOLERANCE,
        "metrics": {k: list(v) for k, v in pairs.items()},
        "reasons": reasons,
        "assumptions": list(measured.assumptions),
    }


def withdraw(run: Run, reasons: Sequence[str]) -> None:
    """Take back what an uncalibrated run says: its findings are information with low confidence (as U6 does with
    tainted ones), and one finding says why."""
    for finding in run.findings:
        finding.severity = "info"
        finding.conf = min(finding.conf, CONF)
        finding.tags = (*finding.tags, TAG)
    run.findings.append(
        Finding(
            UNCALIBRATED, UNCALIBRATED.severity, 0, expected=f"numbers of the recording within {TOLERANCE:.0%}",
            observed="; ".join(reasons), conf=100,
        )
    )  # fmt: skip


def horizon(base: Effects, mine: Effects, end: int) -> int:
    """Until when the recording is evidence for a run (ns): its first effect that differs from the recorded policy's."""
    for one, other in zip(base, mine, strict=False):
        if one != other:
            return min(one[0], other[0])
    shorter, longer = sorted((base, mine), key=len)
    return longer[len(shorter)][0] if len(longer) > len(shorter) else end
