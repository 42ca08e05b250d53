"""What the machines say today about recordings of all sorts, pinned: `python -m tests.conformance.pinned [SYSTEM...]`.

The scenarios, the seeded bugs and the rule tests say what is right. These runs say only that nothing has changed:
every finding with all its fields and evidence, every number, every effect of a run goes into one digest, kept in
`pinned/SYSTEM.txt`. They reach what nobody thought of: unknown beginnings, damaged records, other policies, what-ifs
with bodies. Those called *hunted* are few, each there because it tells a changed machine from the original when nothing
else does (`bench/hunt.py`). A digest that differs after a change that should change nothing shows a mistake; after one
that should, look at the difference (`--show RUN` prints a run in full, before and after), then write the digests anew
(`--write`).
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from replay.bodies import Measured
from replay.declare import Config, UsageError
from replay.driver import Run, run_machine
from replay.events import KIND_ID, KINDS, NIL, NONE, events_from_json
from replay.scenario import load_scenario
from replay.sink import Finding
from replay.systems import SYSTEMS
from tests.conformance.hunted import stream
from tests.conformance.pinned_grammar import GRAMMAR, SETTINGS, STEPS, Setting
from tracetool.seeded import BUGS, Bug
from tracetool.session import MEASURED_COLUMNS

__all__ = [
    "GROUPS", "PINS", "add_hunted", "bugs", "known_names", "lines", "measure", "pinned", "recording", "runs", "said",
    "text", "warm",
]  # fmt: skip

PINS = Path(__file__).with_name("pinned")
SCENARIOS = Path(__file__).resolve().parents[2] / "samples" / "scenarios"
Event = dict[str, Any]
#: Roles that a what-if is fed with.
FED = ("stimulus", "context", "response", "marker")
#: Kinds of runs; each is a test of its own.
GROUPS = ("scenarios", "seeded", "damaged", "what-ifs", "random", "random-closed", "hunted")
#: Events of a damaged slice and of a random stream; slices of each seeded recording, random streams for each policy.
SLICE, STREAM, SLICES, STREAMS = 400, 500, 4, 6
#: What a user has to say for a what-if, and the stimulus that few recorders show.
ASKED: dict[str, dict[str, int]] = {"callback": {"vector": 0x59}}
UNSEEN = {"callback": "via.upcall_set"}
#: What machines read where a column is null.
NULLS = {"cpu": NONE, "dom": NONE, "vcpu": NONE, "obj": NONE, "tgt": NONE, "val": NIL, "val2": NIL}
WORDS = tuple(f.name for f in fields(Finding) if f.name not in ("code", "cause"))


def text(run: Run, known: frozenset[str] | None = None) -> str:
    """Everything that a run says, for people and for the digest; of numbers and tables only the `known` ones."""
    said = [f"{f.code.name} " + " ".join(f"{w}={getattr(f, w)!r}" for w in WORDS) for f in run.findings]
    told = {**run.metrics, **run.extra, "suppressed": run.suppressed}
    said += [f"{n} = {value}" for n, value in sorted(told.items()) if known is None or n.partition(".")[0] in known]
    said += [f"effect {t} {what}" for t, what in run.effects]
    return "\n".join(said)


# -- runs --------------------------------------------------------------------------------------------------------------


def _scenarios(system: str) -> Iterator[tuple[str, Callable[[], Run]]]:
    """The events of each scenario as a recording, from the beginning and with an unknown one."""
    for path in sorted(SCENARIOS.glob("*.json")):
        s = load_scenario(path)
        if s.system.name == system:
            for policy in s.system.policies:
                for known in (True, False):
                    yield (
                        f"{s.id} {policy} {'known' if known else 'unknown'}",
                        partial(
                            run_machine, s.system, policy, [s.events], config=Config(s.system.parameters, s.config),
                            closed=False, sub=s.sub, init=s.init, t_end=s.end, from_boot=known,
                        ),
                    )  # fmt: skip
                yield (
                    f"{s.id} {policy} closed",
                    partial(
                        run_machine, s.system, policy, [s.events], config=Config(s.system.parameters, s.config),
                        closed=True, sub=s.sub, init=s.init, t_end=s.end,
                    ),
                )  # fmt: skip


@cache
def recording(name: str, bad: bool) -> tuple[Event, ...]:
    bug = next(b for b in BUGS if b.name == name)
    return bug.record(bad=bad).events


def warm(system: str) -> None:
    """Make the recordings that do not depend on the machines."""
    for bug in bugs(system):
        for bad in (True, False):
            recording(bug.name, bad)


def bugs(system: str) -> list[Bug]:
    return [b for b in BUGS if b.system == system]


def _replay(
    system: str, policy: str, events: Sequence[Event], *, closed: bool, known: bool, sub: str, config: Any,
    observed: frozenset[str] | None = None, measured: Measured | None = None,
) -> Run:  # fmt: skip
    s = SYSTEMS[system]
    return run_machine(
        s, policy, [events_from_json(events)], config=Config(s.parameters, config), closed=closed, sub=sub,
        t_end=events[-1]["t"] + 30_000_000 if events else 0, from_boot=known, observed=observed, measured=measured,
    )  # fmt: skip


def _seeded(system: str) -> Iterator[tuple[str, Callable[[], Run]]]:
    """The first part of the seeded recordings under the policies of the simulator, whole knowledge and none."""
    for bug in bugs(system):
        for bad in (True, False):
            events = recording(bug.name, bad)[: 3 * SLICE]
            for known in (True, False):
                yield (
                    f"{bug.name} {'bad' if bad else 'good'} {'known' if known else 'unknown'}",
                    partial(
                        _replay, system, bug.bad if bad else bug.good, events, closed=False, known=known, sub=bug.sub,
                        config=bug.config,
                    ),
                )  # fmt: skip


def _damage(events: Sequence[Event], draw: random.Random) -> list[Event]:
    """Records lost, doubled, moved, and with a field of another record of their kind."""
    out: list[Event] = []
    held: Event | None = None
    for event in events:
        what = draw.random()
        if what < 0.03:
            continue
        if what < 0.05:
            out.append(event)
        elif what < 0.07 and held is None:
            held = event
            continue
        elif what < 0.10:
            other = draw.choice(events)
            name = draw.choice(("obj", "tgt", "val", "vcpu", "cpu", "flags"))
            if other["kind"] == event["kind"] and name in other:
                event = {**event, name: other[name]}
        elif what < 0.102:
            out.append({"t": event["t"], "kind": "trace.lost", "val": event["t"] - draw.choice((0, 1_000, 300_000))})
        out.append(event)
        if held is not None:
            out.append({**held, "t": event["t"]})
            held = None
    return out


def _damaged(system: str) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Slices of seeded recordings, damaged, under every policy."""
    for bug in bugs(system):
        for number in range(SLICES):
            draw = random.Random(number)
            whole = recording(bug.name, number % 2 == 0)
            start = 0 if number == 0 else draw.randrange(max(1, len(whole) - SLICE))
            events = _damage(whole[start : start + SLICE], draw)
            for policy in SYSTEMS[system].policies:
                yield (
                    f"{bug.name} slice {number} {policy}",
                    partial(
                        _replay, system, policy, events, closed=False, known=number < 2, sub=bug.sub, config=bug.config
                    ),
                )


def measure(system: str, events: Sequence[Event], config: Any) -> tuple[Measured, frozenset[str], dict[str, Any]]:
    """What a what-if takes from a recording: measured values, the kinds that are fed, both in words."""
    s = SYSTEMS[system]
    whole = pl.from_arrow(events_from_json(events).select(list(MEASURED_COLUMNS)))
    assert isinstance(whole, pl.DataFrame)
    frame = whole.with_columns(pl.col("kind").cast(pl.String))

    def read(kinds: Sequence[str], limit: int | None = None) -> pl.DataFrame:
        some = frame.filter(pl.col("kind").is_in(list(kinds)))
        return (some if limit is None else some.head(limit)).with_columns(pl.col("seq").set_sorted())

    observed = frozenset(e["kind"] for e in events)
    measured = s.measure(read, Config(s.parameters, config), observed) if s.measure else Measured()
    fed = s.stimuli or tuple(k for k in s.kinds if KINDS[KIND_ID[k]].role in FED)
    words = ("values", "init", "assumptions", "blind", "undecided", "reach_ns", "inferred", "only")
    told = {"measured": [{"what": f"{w} {getattr(measured, w)}"} for w in words]}
    if s.effect is not None:
        some = frame.filter(pl.col("kind").is_in(list(s.outcomes))).head(20)
        seen: list[dict[str, Any]] = [
            {k: NULLS.get(k) if v is None else v for k, v in e.items()} for e in some.iter_rows(named=True)
        ]
        told["effects"] = [{"what": f"{w} {s.effect_words(w)} {s.effect_fields(w)} {s.effect_object(w)}"}
                           for w in (s.effect(e) for e in seen)]  # fmt: skip
    return measured, frozenset(fed), told


def _what_if(system: str, policy: str, events: Sequence[Event], sub: str, config: Any) -> Run:
    """As from the command line: measured in the recording, its stimuli replayed."""
    s = SYSTEMS[system]
    measured, fed, told = measure(system, events, config)
    table = events_from_json(events)
    run = run_machine(
        s, policy, [table.filter(pa.array([e["kind"] in fed for e in events]))],
        config=Config(s.parameters, {**measured.values, **config}), closed=True,
        sub=sub or ("retimed" if s.measure else ""), t_end=events[-1]["t"] + 1_000_000, from_boot=False,
        observed=frozenset(e["kind"] for e in events), measured=measured,
    )  # fmt: skip
    run.extra.update(told)
    return run


def _what_ifs(system: str) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Seeded recordings, whole and damaged, under every policy, with the bodies and lags that were measured in them."""
    for bug in bugs(system):
        if bug.sub:
            continue
        for bad in (True, False):
            whole = recording(bug.name, bad)[: 3 * SLICE]
            blind = [e for e in whole if e["kind"] != UNSEEN.get(system, "")]
            for name, events, more in (
                ("whole", whole, ASKED.get(system, {})),
                ("damaged", _damage(whole, random.Random(7)), ASKED.get(system, {})),
                ("without sets", blind, ASKED.get(system, {})),
                ("as it is", whole, {}),
            ):
                if name in ("without sets", "as it is") and system not in ASKED:
                    continue
                for policy in SYSTEMS[system].policies:
                    yield (
                        f"{bug.name} {'bad' if bad else 'good'} {name} {policy}",
                        partial(_what_if, system, policy, tuple(events), bug.sub, {**bug.config, **more}),
                    )


def _stream(system: str, phrases_of: str, seed: int) -> list[Event]:
    """Events of a system's grammar, in an order that nothing but chance decides."""
    draw = random.Random(seed)
    phrases = GRAMMAR[phrases_of]
    out: list[Event] = []
    t = 0
    while len(out) < STREAM:
        for kind, pools in draw.choice(phrases):
            t += draw.choice(STEPS[system])
            event: Event = {"t": t, "kind": kind}
            for name, pool in pools.items():
                value: Any = draw.choice(pool)
                if value == "=":
                    value = out[-1].get(name)
                if value is not None:
                    event[name] = t - value if kind == "trace.lost" and name == "val" else value
            out.append(event)
    return out


def _random(system: str, *, closed: bool = False) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Streams that no machine could have made."""
    settings = SETTINGS[system]
    for number in range(len(settings) * (STREAMS // 2 if closed else STREAMS)):
        setting = settings[number % len(settings)]
        for policy in setting.policies or SYSTEMS[system].policies:
            for known in (True,) if closed else (True, False):
                yield (
                    f"stream {number} {policy} {'known' if known else 'unknown'}",
                    partial(_random_run, system, policy, number, closed, known, setting),
                )


def _random_run(system: str, policy: str, number: int, closed: bool, known: bool, setting: Setting) -> Run:
    s = SYSTEMS[system]
    events = _stream(system, setting.phrases or system, number)
    if closed:
        given = [e for e in events if KINDS[KIND_ID[e["kind"]]].role in ("stimulus", "context")]
        events = given[: SLICE // 2] or events[:1]
    kinds = sorted({e["kind"] for e in events})
    # Of all that happens; of a recorder that shows all these kinds; of one that shows some only.
    observed = [None, frozenset(kinds), frozenset(k for i, k in enumerate(kinds) if (i + number) % 5)]
    return run_machine(
        s, policy, [events_from_json(events)], config=Config(s.parameters, setting.config), closed=closed,
        init=setting.init, sub=setting.sub, t_end=events[-1]["t"] + (1_000_000 if closed else 50_000_000),
        from_boot=known, observed=None if closed else observed[number // len(SETTINGS[system]) % 3],
    )  # fmt: skip


def _hunted(system: str) -> Iterator[tuple[str, Callable[[], Run]]]:
    """The streams that have pins."""
    for one in pinned(system, "hunted"):
        name = one.partition(", ")[2].partition(":")[0]
        yield name, partial(_stream_of, system, name)


def _stream_of(system: str, name: str) -> Run:
    flavour, number = name.split()
    return stream(system, flavour, int(number))


def runs(system: str, group: str) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Names of runs and how to make them."""
    if group == "random-closed":
        yield from _random(system, closed=True)
        return
    makers = {
        "scenarios": _scenarios, "seeded": _seeded, "damaged": _damaged, "what-ifs": _what_ifs, "random": _random,
        "hunted": _hunted,
    }  # fmt: skip
    yield from makers[group](system)


# -- pins --------------------------------------------------------------------------------------------------------------


def line(name: str, run: Run, known: frozenset[str] | None) -> str:
    """One line of a file of pins: the run, how many of which finding, the digest of everything."""
    counts = Counter(f.code.name for f in run.findings)
    told = ", ".join(f"{n} {code}" for code, n in sorted(counts.items())) or "nothing"
    return f"{name}: {told}; {hashlib.sha256(text(run, known).encode()).hexdigest()[:16]}"


def lines(system: str, group: str, known: frozenset[str] | None, names: set[str] | None = None) -> list[str]:
    """The pins as they are now. `names` collects what numbers and tables are called."""
    return [said(f"{group}, {name}", make, known, names) for name, make in runs(system, group)]


def said(name: str, make: Callable[[], Run], known: frozenset[str] | None, names: set[str] | None = None) -> str:
    """The pin of one run as it is now."""
    try:
        run = make()
    except UsageError as error:
        return f"{name}: refused, {error}"
    if names is not None:
        names.update(n.partition(".")[0] for n in (*run.metrics, *run.extra, "suppressed"))
    return line(name, run, known)


def add_hunted(system: str, streams: Sequence[str]) -> int:
    """Make pins of streams ("FLAVOUR NUMBER") that have none; returns how many."""
    before = _written(system)
    known = known_names(system)
    have = {one.partition(":")[0] for one in before}
    new = [f"hunted, {one}" for one in streams if f"hunted, {one}" not in have]
    made = [said(name, partial(_stream_of, system, name.partition(", ")[2]), known) for name in new]
    (PINS / f"{system}.txt").write_text("\n".join([*before, *made]) + "\n", encoding="utf-8")
    return len(new)


def pinned(system: str, group: str) -> list[str]:
    """The pins as they were written."""
    return [one for one in _written(system)[1:] if one.startswith(f"{group}, ")]


def known_names(system: str) -> frozenset[str] | None:
    """Numbers and tables that there were when the pins were written: a new one is no change."""
    return frozenset(_written(system)[0].split()[1:]) if _written(system) else None


def _written(system: str) -> list[str]:
    path = PINS / f"{system}.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", nargs="*", default=sorted(SETTINGS))
    parser.add_argument("--write", action="store_true", help="write the digests anew")
    parser.add_argument("--show", metavar="RUN", help='print a run in full, e.g. "damaged, hpet slice 2 current"')
    options = parser.parse_args()
    for system in options.system:
        if options.show:
            group, _, name = options.show.partition(", ")
            for one, make in runs(system, group):
                if one == name:
                    print(text(make()))
            continue
        names: set[str] = set()
        known = None if options.write else known_names(system)
        before = _written(system)[1:]
        now = [one for group in GROUPS for one in lines(system, group, known, names)]
        if options.write:
            header = f"known: {' '.join(sorted(names))}"
            (PINS / f"{system}.txt").write_text("\n".join([header, *now]) + "\n", encoding="utf-8")
        changed = [one for one in now if one not in before]
        print(f"{system}: {len(now)} runs, {len(changed)} differ")
        print("".join(f"  {one}\n" for one in changed[:20]), end="")


if __name__ == "__main__":
    main()
