"""Event channels: what a what-if run takes from a recording (spec 0.6, S5.7).

Exogenous are sends, mask and unmask requests, bindings, scheduling. From a send to the upcall the vCPU was busy, not
running, or had upcalls masked: a lag, the same under any policy. A handler's own mask and unmask requests are its body
and move with its dispatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import polars as pl

from replay.bodies import Lags, Measured, Read, median, of_kinds
from replay.declare import Config
from replay.events import NONE
from replay.hardware.evtchn_two_level import SNAP_MASK

__all__ = [
    "CALIBRATE", "DRIVES", "OUTCOMES", "STIMULI", "doubt", "effect", "effect_fields", "effect_object", "effect_words",
    "measure",
]  # fmt: skip

DRIVES: Final = ("evtchn.send",)
OUTCOMES: Final = ("evtchn.handled",)
#: Numbers in which a what-if under the recorded policy must agree with the recording.
CALIBRATE: Final = ("handled", "upcalls", "sum_delivery_ns")
#: What is fed to what-if runs: no snapshots, which are outcomes of what really ran, and no acks.
STIMULI: Final = (
    "evtchn.bind", "evtchn.send", "evtchn.bind_vcpu", "guest.bind_cpu", "evtchn.rebind", "evtchn.mask",
    "evtchn.unmask", "evtchn.upcall_mask", "evtchn.upcall_unmask", "evtchn.close", "fifo.consuming", "sched.run",
    "sched.stop", "trace.lost",
)  # fmt: skip
#: Samples that are too few to doubt a recording for.
FEW: Final = 100
#: Samples in which the first one of each mask word is looked for.
EARLY: Final = 4096
_REBINDS: Final = ("evtchn.bind_vcpu", "guest.bind_cpu", "evtchn.rebind", "evtchn.bind")
_KINDS: Final = (*OUTCOMES, *DRIVES, *_REBINDS, "evtchn.upcall")


def doubt(metrics: Mapping[str, int], config: Config) -> str:
    """Sampled pending, mask and selector words that differ from the model in more than a few cases: events that move
    them are not recorded, and no rule about them can be relied on."""
    agree, differ = metrics.get("samples_agree", 0), metrics.get("samples_disagree", 0)
    if agree + differ < FEW or 100 * differ <= config.integer("disagree_percent") * (agree + differ):
        return ""
    return (
        f"{differ} of {agree + differ} sampled words are not as the model has them: "
        "events that move them are missing"
    )


def effect(event: Mapping[str, int]) -> int:
    """A dispatch as the machine's effects name it."""
    return event["dom"] << 48 | event["vcpu"] << 32 | event["obj"]


def effect_words(what: int) -> str:
    """The effect for people."""
    dom = what >> 48
    guest = f" of dom {dom}" if dom >= 0 else ""
    return f"port {what & 0xFFFFFFFF} handled on vcpu {what >> 32 & 0xFFFF}{guest}"


def effect_fields(what: int) -> Mapping[str, int]:
    """The effect as fields of a finding."""
    return {"dom": what >> 48, "vcpu": what >> 32 & 0xFFFF, "obj": what & 0xFFFFFFFF}


def effect_object(what: int) -> int:
    """The port of its domain."""
    return what >> 48 << 32 | what & 0xFFFFFFFF


def measure(read: Read, config: Config, observed: frozenset[str]) -> Measured:
    """Lags of deliveries, and where ports are bound at first."""
    result = Measured()
    if "evtchn.send" not in observed:
        result.blind = (
            "evtchn.send is not recorded: nobody records event-channel sends, and no probe samples evtchn_pending"
        )
        return result
    events = read(_KINDS)
    if not events.filter(pl.col("kind") == "evtchn.send").height:
        result.blind = "no evtchn.send in the recording: the guest's pending bits were never seen to rise"
        return result
    events = events.with_columns(pl.col("dom").cast(pl.Int64).fill_null(NONE))
    handled = of_kinds(events, *OUTCOMES).drop_nulls(["obj", "vcpu"])
    sends = of_kinds(events, *DRIVES)
    upcalls = of_kinds(events, "evtchn.upcall")
    done = handled.join_asof(
        upcalls.select("seq", "dom", "vcpu", entry="t_ns"), on="seq", by=["dom", "vcpu"], strategy="backward",
        check_sortedness=False,
    )  # fmt: skip
    pairs = sends.select("seq", "dom", "obj", at="t_ns").join_asof(
        done.select("seq", "dom", "obj", "entry", done="t_ns"), on="seq", by=["dom", "obj"], strategy="forward",
        check_sortedness=False,
    ).drop_nulls("done")  # fmt: skip
    # Sent while the scan that handled it was running already: seen at once.
    pairs = pairs.with_columns(due=pl.max_horizontal(pl.coalesce("entry", "done"), "at"))
    result.lags = Lags(pairs)
    lags = (pairs["done"] - pairs["at"]).to_list()
    if lags:
        result.values["upcall_ns"] = max(median((pairs["due"] - pairs["at"]).to_list()) or 0, 0)
        result.reach_ns = max(lags)
    _bindings(result, of_kinds(events, *OUTCOMES, *_REBINDS))
    if result.init:
        ports = {int(p) for p in sends["obj"].drop_nulls().unique().to_list()}
        result.init["S5"]["masked"] = _masked(read(("evtchn.snapshot",), EARLY), ports, config.integer("bits_per_word"))
    return result


def _masked(samples: pl.DataFrame, ports: set[int], bits: int) -> list[int]:
    """Ports whose bit is set in the first sample of their word of evtchn_mask[]."""
    words = samples.filter(pl.col("obj") == SNAP_MASK).drop_nulls(["tgt", "val"]).unique("tgt", keep="first")
    first = {int(word): int(value) for word, value in words.select("tgt", "val").iter_rows()}
    return sorted(p for p in ports if first.get(p // bits, 0) >> p % bits & 1)


def _bindings(result: Measured, events: pl.DataFrame) -> None:
    """A port that is handled before anybody binds it was bound there; of the domain with most events only."""
    if not events.height:
        return
    dom = events["dom"].mode().sort()[0]
    mine = events.filter(pl.col("dom") == dom)
    first = mine.unique("obj", keep="first", maintain_order=True).filter(pl.col("kind") == OUTCOMES[0])
    bound = {str(port): vcpu for port, vcpu in first.select("obj", "vcpu").drop_nulls().iter_rows()}
    result.init = {"S5": {"dom": dom, "notify_vcpu": bound, "guest_cpu": bound}}
