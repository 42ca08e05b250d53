"""From a broadcast deadline to the guest's handler: where the time goes (hypervisor and guest on one clock).

One wake is followed through the machine: the HPET handler that the deadline raised, the CPU's exit from idle, the vCPU
that runs next on it, its upcall, and the handler of its timer interrupt. Each part is the time between two of these
moments, so that the parts add up to the whole. The upcall is the first one of the vCPU's run and the handler the first
after it: where the run began for another reason than an event, its time without one counts as "to upcall".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import polars as pl

__all__ = ["KINDS", "PARTS", "budget", "budget_text", "wakes"]

#: Canonical kinds that `wakes` needs.
KINDS: Final = (
    "idle.enter", "idle.exit", "hpet.handler.begin", "hpet.handler.end", "sched.run", "sched.stop",
    "evtchn.upcall", "irqdesc.entry",
)  # fmt: skip

#: The parts in their order: name, the moment that ends it.
PARTS: Final = (
    ("deadline to HPET handler", "begin"),
    ("HPET handler", "end"),
    ("to idle exit", "exit"),
    ("to vCPU running", "run"),
    ("to upcall", "upcall"),
    ("to irq handler", "handler"),
)

#: Reasons of an idle exit (`xentrace_hpet.REASONS`) that a broadcast deadline explains.
_BY_HPET: Final = (1, 2)


def wakes(events: pl.DataFrame) -> pl.DataFrame:
    """One row for each wake that can be followed from its deadline to a handler of the guest.

    `events`: canonical events of KINDS (kind as a string, seq, t_ns, cpu, dom, vcpu, obj, tgt, val), in order.
    Columns: cpu, dom, vcpu, channel, and in ns the moments deadline, start, begin, end, exit, run, upcall, handler;
    `start` is the deadline, or the handler's begin if that came before it (its resolution is 1 us). Times never
    decrease along a row.
    """

    def of(kind: str, *columns: pl.Expr, **named: pl.Expr) -> pl.DataFrame:
        return events.filter(pl.col("kind") == kind).select(*columns, **named).sort("t")

    t = pl.col("t_ns").alias("t")
    cpu = pl.col("cpu").cast(pl.Int64)
    vcpu = pl.col("vcpu").cast(pl.Int64)
    begins = of("hpet.handler.begin", t, begin=pl.col("t_ns"), channel=pl.col("obj"), on=cpu)
    ends = of("hpet.handler.end", t, end=pl.col("t_ns"), channel=pl.col("obj"), on=cpu)
    handlers = begins.join_asof(
        ends, on="t", by=["channel", "on"], strategy="forward", check_sortedness=False
    ).select("t", "begin", "end", "channel")
    exits = of("idle.exit", t, cpu=cpu, exit=pl.col("t_ns"), reason=pl.col("tgt"), channel=pl.col("obj"))
    enters = of("idle.enter", t, cpu=cpu, entered=pl.col("t_ns"), deadline=pl.col("val"))
    runs = of("sched.run", t, cpu=cpu, dom=pl.col("dom"), vcpu=vcpu, run=pl.col("t_ns"))
    stops = of("sched.stop", t, dom=pl.col("dom"), vcpu=vcpu, stop=pl.col("t_ns"))
    # The guest's own CPU numbers are vCPUs.
    guest = events.filter(pl.col("kind") == "irqdesc.entry")["dom"].drop_nulls().unique().to_list()
    upcalls = of("evtchn.upcall", t, dom=pl.col("dom"), vcpu=vcpu, upcall=pl.col("t_ns"))
    entries = of("irqdesc.entry", t, dom=pl.col("dom"), vcpu=cpu, handler=pl.col("t_ns"))
    asof: dict[str, Any] = {"on": "t", "check_sortedness": False}
    woke = (
        exits.filter(pl.col("reason").is_in(_BY_HPET))
        .join_asof(enters, by="cpu", strategy="backward", **asof)
        .filter(pl.col("deadline").is_not_null())
        .join_asof(handlers, by="channel", strategy="backward", **asof)
        .filter((pl.col("begin") >= pl.col("entered")) & (pl.col("end") <= pl.col("exit")))
        .join_asof(runs.filter(pl.col("dom").is_in(guest)), by="cpu", strategy="forward", **asof)
        .filter(pl.col("run").is_not_null())
    )
    again = enters.select("t", "cpu", again="entered")
    woke = woke.join_asof(again, by="cpu", strategy="forward", allow_exact_matches=False, **asof)
    woke = woke.filter(pl.col("again").is_null() | (pl.col("run") < pl.col("again"))).with_columns(t="run").sort("t")
    # What comes after the vCPU has stopped again has another cause.
    in_run = {"by": ["dom", "vcpu"], "strategy": "forward", **asof}
    woke = woke.join_asof(stops, **in_run).join_asof(upcalls, **in_run)
    woke = woke.filter(pl.col("upcall") < pl.col("stop").fill_null(pl.col("upcall") + 1))
    woke = woke.with_columns(t="upcall").sort("t").join_asof(entries, **in_run)
    woke = woke.filter(pl.col("handler") < pl.col("stop").fill_null(pl.col("handler") + 1))
    # One upcall serves one wake: the last before it.
    woke = woke.sort("exit").unique(["dom", "vcpu", "upcall"], keep="last", maintain_order=True)
    return woke.with_columns(start=pl.min_horizontal("deadline", "begin")).select(
        "cpu", "dom", "vcpu", "channel", "deadline", "start", *(moment for _, moment in PARTS)
    )


def budget(found: pl.DataFrame) -> dict[str, Any]:
    """Sums over wakes: `{"wakes", "total_ns", "parts": [{"part", "ns", "share", "median_ns", "max_ns"}]}`.

    The shares (0..1) add up to 1 exactly as the nanoseconds add up to `total_ns`. `early` counts handlers that began
    before their deadline.
    """
    moments = ["start", *(moment for _, moment in PARTS)]
    total = int((found["handler"] - found["start"]).sum()) if found.height else 0
    parts = []
    for (name, moment), before in zip(PARTS, moments, strict=False):
        spent = found[moment] - found[before]
        ns = int(spent.sum())
        parts.append(
            {
                "part": name, "ns": ns, "share": ns / total if total else 0.0,
                "median_ns": int(spent.median() or 0), "max_ns": int(spent.max() or 0),  # type: ignore[arg-type]
            }
        )  # fmt: skip
    early = int((found["begin"] < found["deadline"]).sum())
    return {"wakes": found.height, "early": early, "total_ns": total, "parts": parts}


def budget_text(result: dict[str, Any]) -> Sequence[str]:
    """The budget as lines of a table; nothing without wakes."""
    if not result["wakes"]:
        return []
    mean = result["total_ns"] / result["wakes"]
    lines = [f"from deadline to the guest's handler: {result['wakes']:,} wakes, {mean / 1000:,.1f} us on average"]
    for part in result["parts"]:
        lines.append(
            f"  {part['share']:>7.2%}  {part['part']:<26} median {part['median_ns'] / 1000:>9,.1f} us"
            f"  longest {part['max_ns'] / 1000:>11,.1f} us"
        )
    lines.append(f"  {sum(p['share'] for p in result['parts']):>7.2%}  in all")
    return lines
