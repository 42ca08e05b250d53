"""Streams that tell a changed machine from the original: found by `bench/hunt.py`, kept as pinned runs.

A stream is a flavour and a number; both decide everything about it: system, policy, parameters (the declared ones
turned down, up and off), events, times around the thresholds, what the recorder shows, where the recording begins and
ends. Whoever changes a flavour changes its streams: add a new one instead, or hunt again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from replay.bodies import Measured
from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import KIND_ID, KINDS, NIL, NONE, events_from_json
from replay.sink import Sink
from replay.systems import SYSTEMS
from tests.conformance.pinned_grammar import GRAMMAR, SETTINGS, STEPS, Phrase, Setting

__all__ = ["FLAVOURS", "Stream", "flavours", "prepare", "replay", "stream"]

SCENARIOS: Final = Path(__file__).resolve().parents[2] / "samples" / "scenarios"
Event = dict[str, Any]

#: Values of parameters that are no times; of times see `_config`.
CHOICES: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "gic": {"irqs": (64, 96, 1020), "nr_lrs": (1, 2, 4), "latch_pinned": (0, 1)},
    "hpet": {
        "n_channels": (1, 2, 3), "n_cpus": (2, 3, 4), "stack_limit": (1, 2, 3), "hpet_vector": (48, 128),
        "direct_vector": (241, 80), "fixed_owners": (False, True),
    },
    "irqflow": {
        "cpu": (0, 1), "lateeoi_ns": (None, 0, 2_000, 40_000), "virq_global": (False, True), "percpu": (False, True),
        "irq_type": ("", "edge", "level"), "move_when_dropped": (False, True), "move_at_once": (False, True),
        "storm_per_s": (1, 10, 1_000), "spurious_window": (2, 10), "spurious_risk": (1, 3, 10_000),
    },
    "callback": {
        "gsi": (28, 5), "vector": (0x59, 0x31), "rte_dest_vcpu": (0, 1, 2), "route_vcpu": (-1, 0, 1),
        "sample_on_exit": (0, 1), "apic_id_stride": (0, 1, 2), "gsi_shared": (-1, 0, 1), "eoi_assist": (0, 1),
        "storm_count": (1, 2, 3),
    },
    "apic": {
        "spurious_vector": (255, 0x31), "nesting_limit": (0, 1, 2, 3), "ioapic_latches_edges": (0, 1),
        "ioapic_storm_count": (1, 2, 3),
    },
    "vgic": {"vcpus": (1, 2, 3), "nr_lrs": (1, 2, 4), "phys_follows": ("immediate", "fixed")},
    "evtchn": {"bits_per_word": (32, 64), "hvm": (False, True), "disagree_percent": (0, 5, 50)},
}  # fmt: skip
#: Nothing bad comes of a recording of this length (ns) between two events.
LONGEST: Final = 3_000_000_000
#: Time between the last event and the end of an open run (ns).
ENDS: Final = (0, 1, 1_000, 1_000_000, 50_000_000, 2_000_000_000)


# -- parameters and times ----------------------------------------------------------------------------------------------


def _config(
    system: str, base: Mapping[str, Any], draw: random.Random, closed: bool, rate: float = 0.12
) -> dict[str, Any]:
    """Some parameters other than declared; closed machines, which do something in these times, get none near zero."""
    config = dict(base)
    for parameter in SYSTEMS[system].parameters:
        if draw.random() >= rate:
            continue
        if parameter.name in CHOICES[system]:
            config[parameter.name] = draw.choice(CHOICES[system][parameter.name])
        elif parameter.unit == "ns" and isinstance(parameter.default, int):
            d = parameter.default
            some = (0, 1, d // 10, d // 100, d * 3, *STEPS[system])
            config[parameter.name] = draw.choice((d // 4, d // 2 + 1, d * 2, d * 3) if closed else some)
    return config


def _steps(system: str, config: Mapping[str, Any], draw: random.Random) -> list[int]:
    """Few distances between events: small ones, and the edges of thresholds."""
    edges = []
    for parameter in SYSTEMS[system].parameters:
        value = config.get(parameter.name, parameter.default)
        if parameter.unit == "ns" and isinstance(value, int) and 0 <= value <= LONGEST:
            edges += [max(value - 1, 0), value, value + 1, value // 2]
    out = draw.choices(STEPS[system], k=draw.randint(1, 4)) + draw.choices(edges or [0], k=draw.randint(0, 4))
    return out + [0] * draw.randint(0, 3)


# -- events ------------------------------------------------------------------------------------------------------------


def _swarm(phrases: Sequence[Phrase], draw: random.Random) -> list[Phrase]:
    """Some of the phrases, with some of the values: few things that meet often."""
    chosen = draw.sample(phrases, draw.randint(min(2, len(phrases)), len(phrases)))
    values: dict[str, set[Any]] = {}
    for phrase in chosen:
        for _, pools in phrase:
            for name, pool in pools.items():
                values.setdefault(name, set()).update(pool)
    kept: dict[str, frozenset[Any] | None] = {}
    for name in sorted(values):
        some = sorted(values[name] - {"="}, key=repr)
        few = draw.random() < 0.5 and some
        kept[name] = frozenset(draw.sample(some, draw.randint(1, min(3, len(some))))) if few else None

    def narrow(name: str, pool: tuple[Any, ...]) -> tuple[Any, ...]:
        some = kept[name]
        return pool if some is None else tuple(v for v in pool if v in some or v == "=") or pool

    return [tuple((kind, {n: narrow(n, p) for n, p in pools.items()}) for kind, pools in phrase) for phrase in chosen]


def _spoken(phrases: Sequence[Phrase], steps: Sequence[int], length: int, draw: random.Random) -> list[Event]:
    out: list[Event] = []
    t = 0
    while len(out) < length:
        for kind, pools in draw.choice(phrases):
            t += draw.choice(steps)
            event: Event = {"t": t, "kind": kind}
            for name, pool in pools.items():
                value: Any = draw.choice(pool)
                if value == "=":
                    value = out[-1].get(name) if out else None
                if value is not None:
                    event[name] = t - value if kind == "trace.lost" and name == "val" else value
            out.append(event)
    return out[:length]


def _twist(events: Sequence[Event], steps: Sequence[int], rate: float, draw: random.Random) -> list[Event]:
    """Events lost, doubled, moved in time, exchanged with their neighbour, with a field of another or none."""
    out: list[Event] = []
    shift = 0
    for event in events:
        what = draw.random() / max(rate, 1e-9)
        event = {**event, "t": event["t"] + shift}
        if event["kind"] == "trace.lost" and event.get("val") is not None:
            event["val"] += shift
        if what < 0.2:
            continue
        if what < 0.3:
            out.append(dict(event))
        elif what < 0.5:
            shift += draw.choice(steps)
        elif what < 0.6 and out:
            event, out[-1] = {**out[-1], "t": event["t"]}, {**event, "t": out[-1]["t"]}
        elif what < 0.85:
            other = draw.choice(events)
            name = draw.choice(("obj", "tgt", "val", "vcpu", "cpu", "flags", "dom"))
            if name in event and name in other:
                event[name] = other[name]
        elif what < 0.9:
            event.pop(draw.choice(("obj", "tgt", "val", "vcpu", "cpu", "flags")), None)
        elif what < 1.0:
            out.append({"t": event["t"], "kind": "trace.lost", "val": event["t"] - draw.choice(steps)})
            if draw.random() < 0.5 and "cpu" in event:
                out[-1]["cpu"] = event["cpu"]
        out.append(event)
    return out


@cache
def _scenarios(system: str) -> tuple[dict[str, Any], ...]:
    sections = {"S1": "hpet", "S2": "callback", "S3": "vgic", "S4": "irqflow", "S5": "evtchn"}
    found = []
    for path in sorted(SCENARIOS.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        name = sections.get(data["system"]) or ("gic" if data["events"][0]["kind"].startswith("gic") else "apic")
        if name == system:
            found.append(data)
    return tuple(found)


@dataclass(slots=True)
class Stream:
    """Everything that a run is made of."""

    system: str
    policy: str
    events: Sequence[Event]
    config: Mapping[str, Any]
    closed: bool
    sub: str = ""
    init: Mapping[str, Any] | None = None
    t_end: int = 0
    boot: bool = False
    shown: frozenset[str] | None = None
    cut: int = 0  # events of the first batch
    fed: frozenset[str] | None = None  # kinds that are fed, None: all
    measured: Measured | None = None
    told: dict[str, Any] = field(default_factory=dict)  # what was measured, in words


def replay(one: Stream, table: Callable[[Sequence[Event]], Any] = events_from_json) -> Run:
    """Run a stream; `table` makes a table of its events."""
    whole = table(one.events)
    if one.fed is not None:
        whole = whole.filter(pa.array([e["kind"] in one.fed for e in one.events]))
    system = SYSTEMS[one.system]
    run = run_machine(
        system, one.policy, [whole.slice(0, one.cut), whole.slice(one.cut)],
        config=Config(system.parameters, one.config), closed=one.closed, sub=one.sub, init=one.init, t_end=one.t_end,
        from_boot=one.boot, observed=one.shown, measured=one.measured,
    )  # fmt: skip
    run.extra.update(one.told)
    return run


# -- flavours ----------------------------------------------------------------------------------------------------------


def _whole(
    system: str, policy: str, events: list[Event], config: Mapping[str, Any], draw: random.Random, *, closed: bool,
    sub: str = "", init: Mapping[str, Any] | None = None,
) -> Stream:  # fmt: skip
    """A machine over events, in one or several batches, of a recorder that shows all or some."""
    if closed:
        events = [e for e in events if KINDS[KIND_ID[e["kind"]]].role in ("stimulus", "context", "marker")]
    kinds = sorted({e["kind"] for e in events})
    shown = draw.choice((None, None, frozenset(kinds), frozenset(k for k in kinds if draw.random() < 0.7)))
    last = events[-1]["t"] if events else 0
    return Stream(
        system, policy, events, config, closed, sub, init,
        t_end=last + draw.choice((0, 1, 1_000, 100_000, 1_000_000) if closed else ENDS),
        boot=closed or draw.random() < 0.5, shown=None if closed else shown,
        cut=draw.choice((0, 0, draw.randint(0, len(events)))),
    )  # fmt: skip


def _setting(system: str, draw: random.Random) -> tuple[Setting, str]:
    setting = draw.choice(SETTINGS[system])
    return setting, draw.choice(setting.policies or tuple(SYSTEMS[system].policies))


def _grammar(system: str, draw: random.Random, closed: bool = False) -> Stream:
    """Phrases in an order that chance decides."""
    setting, policy = _setting(system, draw)
    config = _config(system, setting.config, draw, closed)
    phrases = _swarm(GRAMMAR[setting.phrases or system], draw)
    length = int(10 * 30 ** draw.random())
    events = _spoken(phrases, _steps(system, config, draw), length, draw)
    return _whole(system, policy, events, config, draw, closed=closed, sub=setting.sub, init=setting.init)


#: States to begin with, besides those of settings and scenarios.
STATES: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "irqflow": ({"S4": {"bound": {"5": 1}, "types": {"5": "virq", "6": "ipi"}, "percpu": [6]}},),
    "evtchn": (
        {"S5": {"pending": [3, 65], "masked": [65], "notify_vcpu": {"65": 1, "3": 0}, "guest_cpu": {"65": 1, "3": 2}}},
    ),
}  # fmt: skip


def _narrow(system: str, draw: random.Random, closed: bool = False) -> Stream:
    """Few phrases about few things, fields left out, parameters far from declared."""
    setting, policy = _setting(system, draw)
    config = _config(system, setting.config, draw, closed, 0.3)
    name = setting.phrases or system
    phrases = (*GRAMMAR[name], *GRAMMAR.get(f"{name}-more", ()))
    chosen = _swarm(draw.sample(phrases, min(draw.randint(1, 6), len(phrases))), draw)
    steps = _steps(system, config, draw)
    events = _spoken(chosen, steps, int(8 * 16 ** draw.random()), draw)
    if draw.random() < 0.4:
        bare = draw.choice(("obj", "tgt", "val", "val2", "vcpu", "cpu", "flags", "dom"))
        often = draw.choice((0.1, 0.5))
        events = [{k: v for k, v in e.items() if k != bare or draw.random() >= often} for e in events]
    if draw.random() < 0.3:
        events = _twist(events, steps, 0.1, draw)
    init = draw.choice((setting.init, *STATES.get(system, ()))) if draw.random() < 0.5 else setting.init
    return _whole(system, policy, events, config, draw, closed=closed, sub=setting.sub, init=init)


def _clean(system: str, draw: random.Random, closed: bool = False, words: str = "clean") -> Stream:
    """Few things that happen where everything is seen from the beginning: what is wrong shows."""
    setting, policy = _setting(system, draw)
    config = _config(system, setting.config, draw, closed, draw.choice((0.0, 0.3)))
    name = setting.phrases or system
    own = GRAMMAR.get(f"{name}-{words}")
    phrases = own if own and draw.random() < 0.8 else (*GRAMMAR[name], *GRAMMAR.get(f"{name}-more", ()))
    chosen = _swarm(draw.sample(phrases, min(draw.randint(1, 4), len(phrases))), draw)
    events = _spoken(chosen, _steps(system, config, draw), int(4 * 12 ** draw.random()), draw)
    init = draw.choice((setting.init, *STATES.get(system, ()))) if draw.random() < 0.3 else setting.init
    one = _whole(system, policy, events, config, draw, closed=closed, sub=setting.sub, init=init)
    one.boot, one.shown = True, None
    return one


def _scenario(system: str, draw: random.Random) -> Stream:
    """Events of scenarios one after the other, twisted."""
    first = draw.choice(_scenarios(system))
    sub = first.get("sub") or ""
    closed = first["mode"] == "closed" and draw.random() < 0.7
    config = _config(system, first.get("config", {}), draw, closed)
    steps = _steps(system, config, draw)
    events: list[Event] = []
    for _ in range(draw.randint(1, 5)):
        data = draw.choice([s for s in _scenarios(system) if (s.get("sub") or "") == sub]) if events else first
        start = events[-1]["t"] + draw.choice(steps) if events else 0
        events += [{**e, "t": e["t"] + start} for e in data["events"]]
    events = _twist(events, steps, draw.choice((0.0, 0.05, 0.2, 0.5)), draw)
    policy = draw.choice(sorted(first["policies"]))
    policy = SYSTEMS[system].roles.get(policy, policy)
    return _whole(system, policy, events, config, draw, closed=closed, sub=sub, init=first.get("init") or {})


def _slice(system: str, draw: random.Random) -> tuple[list[Event], Any, str]:
    """Part of a seeded recording, twisted; its bug; a policy."""
    from tests.conformance.pinned import bugs, recording

    bug = draw.choice(bugs(system))
    whole = recording(bug.name, draw.random() < 0.5)
    length = int(20 * 20 ** draw.random())
    start = 0 if draw.random() < 0.3 else draw.randrange(max(1, len(whole) - length))
    steps = _steps(system, bug.config, draw)
    events = _twist(whole[start : start + length], steps, draw.choice((0.0, 0.02, 0.1, 0.3)), draw)
    policies = SYSTEMS[system].policies
    usual = [bug.bad, bug.good, SYSTEMS[system].recorded]
    policy = draw.choice([p for p in usual if p in policies]) if draw.random() < 0.5 else draw.choice(sorted(policies))
    return events, bug, policy


def _recorded(system: str, draw: random.Random, closed: bool = False) -> Stream:
    """Part of a seeded recording, twisted."""
    events, bug, policy = _slice(system, draw)
    config = _config(system, bug.config, draw, closed)
    return _whole(system, policy, events, config, draw, closed=closed, sub=bug.sub)


def _what_if(system: str, draw: random.Random) -> Stream:
    """The stimuli of a recording, with what was measured in it."""
    from tests.conformance.pinned import ASKED, measure

    if draw.random() < 0.6:
        events, bug, policy = _slice(system, draw)
        base, sub = bug.config, bug.sub
    else:
        setting, policy = _setting(system, draw)
        base, sub = setting.config, setting.sub
        phrases = _swarm(GRAMMAR[setting.phrases or system], draw)
        events = _spoken(phrases, _steps(system, base, draw), int(20 * 12 ** draw.random()), draw)
    if sub:  # no what-if on recordings
        return _whole(system, policy, events, base, draw, closed=True, sub=sub)
    asked = ASKED.get(system, {}) if draw.random() < 0.8 else {}
    missing = draw.choice(["", "", *sorted({e["kind"] for e in events})])
    events = [e for e in events if e["kind"] != missing] or [{"t": 0, "kind": "trace.lost"}]
    given = {**_config(system, base, draw, True), **asked}
    measured, fed, told = measure(system, events, given)
    return Stream(
        system, policy, events, {**measured.values, **given}, True,
        sub="retimed" if SYSTEMS[system].measure else "", t_end=events[-1]["t"] + 1_000_000,
        shown=frozenset(e["kind"] for e in events), fed=fed, measured=measured, told=told,
    )  # fmt: skip


def _round_trip(system: str, draw: random.Random) -> Stream:
    """What a perfect recorder makes of a closed run (vgic only): a recording without a mistake, or with few."""
    policies = sorted(SYSTEMS[system].policies)
    base = {"vcpus": draw.choice((2, 3)), "nr_lrs": draw.choice((1, 1, 2, 4)),
            "phys_follows": draw.choice(("immediate", "fixed"))}  # fmt: skip
    config = _config(system, base, draw, True)
    steps = [draw.choice((0, 100, 499, 500, 501, 1_000, 3_999, 4_000, 4_500, 60_000)) for _ in range(4)]
    phrases = _swarm(GRAMMAR[f"{system}-load"], draw)
    events = _spoken(phrases, steps, int(8 * 10 ** draw.random()), draw)
    machine: Any = SYSTEMS[system].make(
        SYSTEMS[system].policies[draw.choice(policies)](), Config(SYSTEMS[system].parameters, config),
        Sink(closed=True), "",
    )  # fmt: skip
    machine.log = []
    default = {"kind": 0, "t_ns": 0, "val": NIL, "val2": NIL, "flags": 0, "conf": 100}
    named = [{**default, **e, "kind": KIND_ID[e["kind"]], "t_ns": e["t"], "seq": i} for i, e in enumerate(events)]
    machine.consume(tuple(e.get(n, NONE) for n in machine.columns) for e in named)
    machine.finish(events[-1]["t"] + 100_000)
    seen: list[Event] = []
    for kind, t, *fields, val in machine.log:
        given = {n: v for n, v in zip(("cpu", "vcpu", "obj", "tgt"), fields, strict=True) if v != NONE}
        seen.append({"t": t, "kind": KINDS[kind].name, **given, **({} if val == NIL else {"val": val})})
    if draw.random() < 0.5:
        seen = _twist(seen, [*steps, 200_000, 30_000_000], draw.choice((0.02, 0.1)), draw)
    config = _config(system, base, draw, False, 0.1)
    return _whole(system, draw.choice(policies), seen or events, config, draw, closed=False)


#: Parameters of flavour "seen" that make its runs short.
SHORT: Final[dict[str, dict[str, Any]]] = {"gic": {"irqs": 64}}


def _seen(system: str, draw: random.Random) -> Stream:
    """A recorder that shows everything; many begin with what happens after reset."""
    setting, policy = _setting(system, draw)
    config = {**_config(system, setting.config, draw, False, 0.15), **SHORT.get(system, {})}
    first, *rest = GRAMMAR[f"{system}-seen"]
    chosen = _swarm(draw.sample(rest, draw.randint(2, 7)), draw)
    steps = _steps(system, config, draw)
    begin = _spoken([first], [1], len(first), draw) if draw.random() < 0.6 else []
    after = _spoken(chosen, steps, int(6 * 12 ** draw.random()), draw)
    events = begin + [{**e, "t": e["t"] + 20} for e in after]
    if draw.random() < 0.3:
        events = events[: len(begin)] + _twist(events[len(begin) :], steps, 0.1, draw)
    one = _whole(system, policy, events, config, draw, closed=False, sub=setting.sub, init=setting.init)
    one.shown = frozenset(kind.name for kind in KINDS)
    return one


FLAVOURS: Final[dict[str, Callable[[str, random.Random], Stream]]] = {
    "grammar": _grammar,
    "grammar-closed": partial(_grammar, closed=True),
    "narrow": _narrow,
    "narrow-closed": partial(_narrow, closed=True),
    "clean": _clean,
    "clean-closed": partial(_clean, closed=True),
    "scenario": _scenario,
    "recorded": _recorded,
    "recorded-closed": partial(_recorded, closed=True),
    "what-if": _what_if,
    "round-trip": _round_trip,
    "cycle": partial(_clean, words="cycle"),
    "cycle-closed": partial(_clean, closed=True, words="cycle"),
    "seen": _seen,
}


NO_BUGS: Final = ("grammar", "grammar-closed", "narrow", "narrow-closed", "clean", "clean-closed", "scenario")


def flavours(system: str) -> tuple[str, ...]:
    """Flavours that a system has: without seeded recordings there are no slices of them, and no what-ifs."""
    from tests.conformance.pinned import bugs

    special = {"round-trip": "load", "cycle": "cycle", "cycle-closed": "cycle", "seen": "seen"}
    own = [f for f in FLAVOURS if f not in special and (bugs(system) or f in NO_BUGS)]
    return (*own, *(f for f, words in special.items() if f"{system}-{words}" in GRAMMAR))


def prepare(system: str, flavour: str, number: int) -> Stream:
    """One stream."""
    return FLAVOURS[flavour](system, random.Random(f"{system} {flavour} {number}"))


def stream(system: str, flavour: str, number: int) -> Run:
    """Run one stream; UsageError where the machine refuses it."""
    return replay(prepare(system, flavour, number))
