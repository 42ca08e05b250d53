"""Where the model of the policy that really ran and the recording part (spec 0.5): outcomes matched one by one.

What-if under the recorded policy predicts outcomes from the recorded stimuli; each has to be the recording's, inside a
window. What is predicted and not recorded is `model-missing-outcome`, what is recorded and not predicted
`model-extra-outcome`. Where the model cannot know (the start of an object, lost records, an effect that may come after
the end) neither is raised (U1, U2, U5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import polars as pl

from replay.events import NIL, NONE
from replay.generic import MODEL_EXTRA, MODEL_MISSING
from replay.sink import Evidence, Finding

__all__ = ["LOST_REACH_NS", "part"]

#: After lost records the state of an object is unknown for at least this long (ns).
LOST_REACH_NS: Final = 10_000_000
#: An object that is silent for this long (ns) after a missing outcome is taken to be dead.
SILENCE_NS: Final = 1_000_000_000
#: At most so many findings; a model that parts more often is wrong altogether.
LIMIT: Final = 1_000

_NULLS: Final = {"cpu": NONE, "dom": NONE, "vcpu": NONE, "obj": NONE, "tgt": NONE, "val": NIL}

#: (t ns, half-width ns, seq) of a recorded outcome.
_Seen = tuple[int, int, int]


def part(
    effects: Sequence[tuple[int, int]],
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
) -> list[Finding]:
    """Findings for outcomes that only one side has, by time.

    `effects` are predicted (t ns, what); `recorded` are canonical events of the same outcomes (seq, t_ns, t_err_ns and
    the columns that `effect` reads). `words` names a `what`. `reach_ns`: how late an effect can come, so that one
    predicted closer to `end_ns` may be missing. `lost` are (t0, t1) of lost records. `inferred`: the stimuli were only
    concluded from other records, so that one of them may be wrong: information only, unless the object is silent for
    SILENCE_NS from then on. `subject` is the object of a `what`, wherever it is served;
    `fields` are the finding's cpu, dom, vcpu and obj.
    """
    predicted: dict[int, list[int]] = {}
    for t, what in effects:
        predicted.setdefault(what, []).append(t)
    seen: dict[int, list[_Seen]] = {}
    for row in recorded.with_columns(pl.col(c).fill_null(v) for c, v in _NULLS.items()).iter_rows(named=True):
        if row["cpu"] == NONE and row["vcpu"] == NONE:
            continue
        seen.setdefault(effect(row), []).append((row["t_ns"], row["t_err_ns"], row["seq"]))
    blind = [(t0, t1 + max(LOST_REACH_NS, reach_ns)) for t0, t1 in lost]
    findings: list[Finding] = []
    latest: dict[int, _Seen] = {}  # last recorded outcome of each object
    for what, rows in seen.items():
        latest[subject(what)] = max(latest.get(subject(what), rows[-1]), rows[-1])
    for what in sorted(predicted.keys() | seen.keys()):
        times, rows = sorted(predicted.get(what, ())), seen.get(what, [])
        for t, row_ in _unmatched(times, rows, match_ns):
            if any(t0 <= t <= t1 for t0, t1 in blind):
                continue
            if row_ is None:
                if t <= end_ns - reach_ns:
                    last = latest.get(subject(what))
                    dead = (last is None or last[0] < t) and t < end_ns - SILENCE_NS
                    findings.append(_missing(t, words(what), rows, last, dead=dead))
                    _place(findings[-1], what, fields)
                    if inferred and not dead:
                        # A stimulus that is a little off moves an outcome; it does not end an object's life.
                        findings[-1].severity = "info"
            elif row_ is not rows[0] or any(p < t for p in times):
                findings.append(_extra(row_, words(what), times))
                _place(findings[-1], what, fields)
                if inferred:
                    findings[-1].severity = "info"
    findings.sort(key=lambda f: (f.t, f.code.name))
    return findings[:LIMIT]


def _place(finding: Finding, what: int, fields: Callable[[int], Mapping[str, int]] | None) -> None:
    """Say where and about what it is."""
    for name, value in (fields(what) if fields is not None else {}).items():
        setattr(finding, name, value)


def _unmatched(times: list[int], rows: list[_Seen], match_ns: int) -> Iterator[tuple[int, _Seen | None]]:
    """What only one side has: (t, None) predicted, (t, row) recorded."""
    i = j = 0
    while i < len(times) or j < len(rows):
        if j == len(rows):
            yield times[i], None
            i += 1
        elif i == len(times):
            yield rows[j][0], rows[j]
            j += 1
        else:
            t, half, _ = rows[j]
            if abs(t - times[i]) <= max(half, match_ns):
                i += 1
                j += 1
            elif times[i] < t:
                yield times[i], None
                i += 1
            else:
                yield t, rows[j]
                j += 1


def _missing(t: int, text: str, rows: list[_Seen], last: _Seen | None, *, dead: bool) -> Finding:
    later = next((r for r in rows if r[0] > t), None)
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


def _extra(row: _Seen, text: str, times: list[int]) -> Finding:
    t, _, seq = row
    later = next((p for p in times if p > t), None)
    expected = "no such outcome" if later is None else f"none until {later - t} ns later"
    return Finding(
        MODEL_EXTRA, MODEL_EXTRA.severity, t, expected=expected, observed=text, conf=50, seq=seq,
        evidence=(Evidence(t, seq, f"recorded: {text}"),),
    )  # fmt: skip
