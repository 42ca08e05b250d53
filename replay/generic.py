"""Divergence codes that belong to no system (spec 0.8)."""

from __future__ import annotations

from typing import Final

from replay.declare import Code

__all__ = ["CODES", "MODEL_EXTRA", "MODEL_MISSING", "UNCALIBRATED"]

UNCALIBRATED: Final = Code(
    "model-uncalibrated",
    "warn",
    "0.5",
    "comparison of a what-if run of the recorded policy with the recording",
    "The model of the policy that really ran does not reproduce the recording's own numbers within the tolerance.",
    "Stimuli that are not recorded, latencies that differ from the model's, or another algorithm than assumed.",
    "the recorded policy's numbers agree within a quarter",
)
LOST_WINDOW: Final = Code(
    "trace-lost-window",
    "info",
    "U2",
    "the recorder's own lost-record marks",
    "Records are missing; what they could have changed is unknown until the next event that tells.",
    "The recorder's buffer was too small or its reader too slow.",
    needs=("trace.lost",),
)
MODEL_MISSING: Final = Code(
    "model-missing-outcome",
    "warn",
    "0.5",
    "model of the policy that really ran, or of the hardware, against the recording",
    "Fed with the recorded stimuli (lines, register accesses, sends …), the model does something the recording does "
    "not show.",
    "A record is missing, another policy ran than assumed (--recorded), the hardware deviates from its manual, or the "
    "model is wrong.",
    "the model's state is unknown there; it does not reproduce the recording anyway (model-uncalibrated)",
    closed=False,
)
MODEL_EXTRA: Final = Code(
    "model-extra-outcome",
    "warn",
    "0.5",
    "model of the policy that really ran, or of the hardware, against the recording",
    "The recording shows what the model, fed with the recorded stimuli (lines, register accesses, sends …), does not "
    "do.",
    "A stimulus is missing, another policy ran than assumed (--recorded), the hardware deviates from its manual, or "
    "the model is wrong.",
    "the model's state is unknown there; it does not reproduce the recording anyway (model-uncalibrated)",
    closed=False,
)

CODES: Final = (UNCALIBRATED, LOST_WINDOW, MODEL_MISSING, MODEL_EXTRA)
