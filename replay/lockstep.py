"""Lockstep: a hardware model is fed the recorded stimuli, and each of its outcomes must be the recording's next one.

An emulator writes what its hardware does under one lock, so an outcome follows its stimulus before anything else
happens. What is predicted and does not come is `model-missing-outcome`; what comes unpredicted `model-extra-outcome`.
Where the model's state is unknown its predictions are *open*: they may come, and count as neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from replay.events import NIL, NONE
from replay.generic import MODEL_EXTRA, MODEL_MISSING
from replay.sink import Evidence, Sink

__all__ = ["ANY", "Lockstep"]

#: A field of an outcome that is not known: it matches everything.
ANY = NIL
#: Steps kept to tell how it came to a mismatch.
STORY = 8


class Lockstep:
    """Expected and recorded outcomes by kind. An outcome is (kind, cpu, obj, tgt, val).

    `names` are the kinds, for metrics and texts. Metrics of a kind: `predicted` (certain predictions), `observed`,
    `mismatch` (missing and extra), `open` (recorded where the model could not tell).
    """

    def __init__(self, sink: Sink, names: Sequence[str]) -> None:
        self.sink: Sink = sink
        self.names: tuple[str, ...] = tuple(names)
        self.predicted: list[int] = [0] * len(names)
        self.observed: list[int] = [0] * len(names)
        self.mismatch: list[int] = [0] * len(names)
        self.open: list[int] = [0] * len(names)
        self.seen: bool = False  # anything was fed at all
        self._expected: list[tuple[int, int, int, int, int, bool]] = []
        self._story: deque[tuple[int, int, str, int, int, int]] = deque(maxlen=STORY)

    def step(self, t: int, seq: int, what: str, cpu: int, obj: int, val: int) -> None:
        """A stimulus is fed: whatever was still expected before it did not happen. `what` names it in a story."""
        self.seen = True
        if self._expected:
            self.settle(t)
        self._story.append((t, seq, what, cpu, obj, val))

    def expect(self, kind: int, cpu: int, obj: int, tgt: int = ANY, val: int = ANY, *, certain: bool = True) -> None:
        """The model's outcome; `certain` False: it may happen."""
        if certain:
            self.predicted[kind] += 1
        self._expected.append((kind, cpu, obj, tgt, val, certain))

    def drop(self, kind: int) -> None:
        """Take back what was expected of a kind."""
        self._expected = [e for e in self._expected if e[0] != kind]

    def finish(self) -> None:
        """The recording ends: what was still expected may have come after it."""
        for kind, *_, certain in self._expected:
            self.predicted[kind] -= certain
        self._expected.clear()

    def expects(self, kind: int, obj: int) -> bool:
        """Whether an outcome of this kind and object is expected or possible now."""
        return any(e[0] == kind and e[2] in (obj, ANY) for e in self._expected)

    def check(self, kind: int, t: int, seq: int, cpu: int, obj: int, tgt: int = ANY, val: int = ANY) -> bool:
        """An outcome was recorded. True when it was expected."""
        self.observed[kind] += 1
        for index, (k, c, o, g, v, certain) in enumerate(self._expected):
            if k == kind and c in (cpu, ANY) and o in (obj, ANY) and g in (tgt, ANY) and v in (val, ANY):
                del self._expected[index]
                if not certain:
                    self.open[kind] += 1
                return True
        wanted = [e for e in self._expected if e[0] == kind]
        self.report_extra(kind, t, seq, cpu, obj, tgt, val, "; ".join(self.text(*e[:5]) for e in wanted) or "nothing")
        if wanted:  # it came differently: one mismatch, not two
            self._expected.remove(wanted[0])
        return False

    def report_extra(
        self, kind: int, t: int, seq: int, cpu: int, obj: int, tgt: int, val: int, expected: str
    ) -> None:
        """The recording has what the model has not, or has it differently."""
        self.mismatch[kind] += 1
        self.sink.report(
            MODEL_EXTRA, t, cpu=cpu, obj=obj if obj >= 0 else NONE, tgt=tgt if tgt >= 0 else NONE, val=val, seq=seq,
            expected=expected, observed=self.text(kind, cpu, obj, tgt, val), evidence=self.story(),
        )  # fmt: skip

    def settle(self, t: int) -> None:
        """What is still expected has not happened."""
        for kind, cpu, obj, tgt, val, certain in self._expected:
            if certain:
                self.mismatch[kind] += 1
                self.sink.report(
                    MODEL_MISSING, t, cpu=cpu if cpu >= 0 else NONE, obj=obj if obj >= 0 else NONE,
                    tgt=tgt if tgt >= 0 else NONE, val=val, seq=self._story[-1][1] if self._story else NONE,
                    expected=self.text(kind, cpu, obj, tgt, val), observed="not recorded", evidence=self.story(),
                )  # fmt: skip
        self._expected.clear()

    def forget(self) -> None:
        """Records were lost: nothing is expected any more."""
        self._expected.clear()
        self._story.clear()

    def text(self, kind: int, cpu: int, obj: int, tgt: int, val: int) -> str:
        """An outcome in words."""
        parts = [self.names[kind].replace("_", " ")]
        for label, value in (("cpu", cpu), ("", obj), ("to", tgt), ("=", val)):
            if value not in (NIL, NONE):
                parts.append(f"{label} {value:#x}".strip())
        return " ".join(parts)

    def story(self) -> tuple[Evidence, ...]:
        """The last stimuli, oldest first."""
        out = []
        for t, seq, what, cpu, obj, val in self._story:
            label = what + (f" {obj:#x}" if obj not in (NIL, NONE) else "")
            label += (f" = {val:#x}" if val != NIL else "") + (f" by cpu {cpu}" if cpu >= 0 else "")
            out.append(Evidence(t, seq, label))
        return tuple(out)

    def metrics(self) -> Mapping[str, int]:
        """Counts by kind, for kinds that were predicted or observed."""
        out: dict[str, int] = {}
        for kind, name in enumerate(self.names):
            if self.predicted[kind] or self.observed[kind]:
                out[f"lockstep.{name}.predicted"] = self.predicted[kind]
                out[f"lockstep.{name}.observed"] = self.observed[kind]
                out[f"lockstep.{name}.mismatch"] = self.mismatch[kind]
                if self.open[kind]:
                    out[f"lockstep.{name}.open"] = self.open[kind]
        return out
