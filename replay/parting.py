"""Where the model of the policy that really ran and the recording part (spec 0.5): outcomes matched one by one.

What-if under the recorded policy predicts outcomes from the recorded stimuli; each has to be the recording's, inside a
window. What is predicted and not recorded is `model-missing-outcome`, what is recorded and not predicted
`model-extra-outcome`. Where the model cannot know (the start of an object, lost records, an effect that may come after
the end) neither is raised (U1, U2, U5).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final

import numpy as np
import polars as pl

from replay.events import NIL, NONE
from replay.generic import MODEL_EXTRA, MODEL_MISSING
from replay.sink import Evidence, Finding, Sink

__all__ = ["LOST_REACH_NS", "part"]

#: After lost records the state of an object is unknown for at least this long (ns).
LOST_REACH_NS: Final = 10_000_000
#: An object that is silent for this long (ns) after a missing outcome is taken to be dead.
SILENCE_NS: Final = 1_000_000_000
#: Recorded outcomes that are looked at together.
SLICE: Final = 1 << 16

_NULLS: Final = {"cpu": NONE, "dom": NONE, "vcpu": NONE, "obj": NONE, "tgt": NONE, "val": NIL}

#: (t ns, half-width ns, seq) of a recorded outcome.
_Seen = tuple[int, int, int]


class _Rows:
    """Recorded outcomes of one `what`, in columns."""

    __slots__ = ("_latest", "halves", "seqs", "times")

    def __init__(self) -> None:
        self.times: array[int] = array("q")
        self.halves: array[int] = array("q")
        self.seqs: array[int] = array("q")
        self._latest: array[int] | None = None

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, index: int) -> _Seen:
        return self.times[index], self.halves[index], self.seqs[index]

    def after(self, t: int) -> _Seen | None:
        """The first that is later than `t`; the order is that of the recording, which is hardly ever that of time."""
        if self._latest is None:
            self._latest = array("q", accumulate(self.times, max))
        index = bisect_right(self._latest, t)
        return self[index] if index < len(self) else None


def part(
    effects: Iterable[tuple[int, int]],
    recorded: pl.DataFrame,
    effect: Callable[[Mapping[str, int]], int],
    words: Callable[[int], str],
    *,
    match_ns: int,
    end_ns: int,
    reach_ns: int,
    lost: Sequence[tuple[int, int]] = (),
    inferred: bool = False,
    subject: Callable[[int], int] = int,
    fields: Callable[[int], Mapping[str, int]] | None = None,
    sink: Sink | None = None,
) -> list[Finding]:
    """Findings for outcomes that only one side has, by time.

    `effects` are predicted (t ns, what); `recorded` are canonical events of the same outcomes (seq, t_ns, t_err_ns and
    the columns that `effect` reads). `words` names a `what`. `reach_ns`: how late an effect can come, so that one
    predicted closer to `end_ns` may be missing. `lost` are (t0, t1) of lost records. `inferred`: the stimuli were only
    concluded from other records, so that one of them may be wrong: information only, unless the object is silent for
    SILENCE_NS from then on. `subject` is the object of a `what`, wherever it is served;
    `fields` are the finding's cpu, dom, vcpu and obj. `sink` counts what it does not keep.
    """
    sink = sink or Sink(closed=False)
    predicted: dict[int, array[int]] = {}
    for t, what in effects:
        predicted.setdefault(what, array("q")).append(t)
    seen = _seen(recorded, effect)
    blind = [(t0, t1 + max(LOST_REACH_NS, reach_ns)) for t0, t1 in lost]
    latest: dict[int, _Seen] = {}  # last recorded outcome of each object
    for what, rows in seen.items():
        latest[subject(what)] = max(latest.get(subject(what), rows[-1]), rows[-1])
    none = _Rows()
    for what in sorted(predicted.keys() | seen.keys()):
        times, rows = _sorted(predicted.get(what)), seen.get(what, none)
        for t, index in _unmatched(times, rows, match_ns):
            if any(t0 <= t <= t1 for t0, t1 in blind):
                continue
            if index == NONE:
                if t > end_ns - reach_ns:
                    continue
                last = latest.get(subject(what))
                dead = (last is None or last[0] < t) and t < end_ns - SILENCE_NS
                finding = _missing(t, words(what), rows, last, dead=dead)
                if inferred and not dead:
                    # A stimulus that is a little off moves an outcome; it does not end an object's life.
                    finding.severity = "info"
            elif index or (times and times[0] < t):
                finding = _extra(rows[index], words(what), times)
                if inferred:
                    finding.severity = "info"
            else:
                continue
            if sink.keeps(finding.code, finding.severity):
                for name, value in (fields(what) if fields is not None else {}).items():
                    setattr(finding, name, value)
                sink.findings.append(finding)
    sink.settle()
    sink.findings.sort(key=lambda f: (f.t, f.code.name))
    return sink.findings


def _sorted(times: array[int] | None) -> array[int]:
    result = array("q")
    if times is not None:
        result.frombytes(np.sort(np.frombuffer(times, np.int64)).tobytes())
    return result


def _seen(recorded: pl.DataFrame, effect: Callable[[Mapping[str, int]], int]) -> dict[int, _Rows]:
    """Recorded outcomes of each `what`."""
    seen: dict[int, _Rows] = {}
    for part_ in recorded.iter_slices(SLICE):
        for row in part_.with_columns(pl.col(c).fill_null(v) for c, v in _NULLS.items()).iter_rows(named=True):
            if row["cpu"] == NONE and row["vcpu"] == NONE:
                continue
            what = effect(row)
            rows = seen.get(what)
            if rows is None:
                rows = seen[what] = _Rows()
            rows.times.append(row["t_ns"])
            rows.halves.append(row["t_err_ns"])
            rows.seqs.append(row["seq"])
    return seen


def _unmatched(times: Sequence[int], rows: _Rows, match_ns: int) -> Iterator[tuple[int, int]]:
    """What only one side has: (t, NONE) predicted, (t, index of the row) recorded."""
    i = j = 0
    while i < len(times) or j < len(rows):
        if j == len(rows):
            yield times[i], NONE
            i += 1
        elif i == len(times):
            yield rows.times[j], j
            j += 1
        else:
            t = rows.times[j]
            if abs(t - times[i]) <= max(rows.halves[j], match_ns):
                i += 1
                j += 1
            elif times[i] < t:
                yield times[i], NONE
                i += 1
            else:
                yield t, j
                j += 1


def _missing(t: int, text: str, rows: _Rows, last: _Seen | None, *, dead: bool) -> Finding:
    later = rows.after(t)
    shown = later
    if later is not None:
        after = f"the next one is {later[0] - t} ns later"
    else:
        after = "nothing of it to the end of the recording" if dead else "never there again"
        shown = last
    story = [Evidence(t, None, f"predicted: {text}")]
    if shown is not None:
        label = f"recorded: {text}" if shown is later else "recorded: the last one of this object"
        story.append(Evidence(shown[0], shown[2], label))
        story.sort(key=lambda step: step.t)
    return Finding(
        MODEL_MISSING, MODEL_MISSING.severity, t, expected=text, observed=f"not recorded; {after}", conf=50,
        seq=shown[2] if shown is not None else NONE, evidence=tuple(story),
    )  # fmt: skip


def _extra(row: _Seen, text: str, times: Sequence[int]) -> Finding:
    t, _, seq = row
    after = bisect_right(times, t)
    later = times[after] if after < len(times) else None
    expected = "no such outcome" if later is None else f"none until {later - t} ns later"
    return Finding(
        MODEL_EXTRA, MODEL_EXTRA.severity, t, expected=expected, observed=text, conf=50, seq=seq,
        evidence=(Evidence(t, seq, f"recorded: {text}"),),
    )  # fmt: skip
