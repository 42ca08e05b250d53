"""One clock for two recordings: whether they share a TSC, or by how much the clocks of guest and host differ.

A guest's records can only be written while its vCPU runs, and the hypervisor recorded when that was: that is the
check of every alignment, and it names the domain. A constant difference is estimated from interrupts: the injection
(and the VM entry after it) comes before the guest's handler, the handler's end comes before the EOI that the
hypervisor saw. Each pair bounds the difference from one side; the width between the bounds is the uncertainty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from replay.binding.base import Records

__all__ = ["Estimate", "Presence", "estimate", "injected", "presence", "stamps"]

Times = NDArray[np.int64]

#: Coarse search: events are put in bins this wide (ns), wider when the recordings are longer than MAX_BINS of them.
BIN_NS: Final = 1_000_000
MAX_BINS: Final = 1 << 22
#: Bins on either side from which the number of chance matches is taken.
NEIGHBOURS: Final = 200
#: Only interrupts that come alone are used for the bounds: no other of the kind this near (ns).
ALONE_NS: Final = 4_000_000
#: A handler is looked for this far (ns) from where the coarse search puts it.
WINDOW_NS: Final = 3_000_000
#: Fewest pairs that make an estimate.
MIN_PAIRS: Final = 16
#: Lowest excess of the best coarse match over chance, in standard deviations, and over the second best.
MIN_SCORE: Final = 8.0
MIN_LEAD: Final = 1.5
#: Share of pairs that may contradict the others.
TRIM: Final = 0.05
#: Share of the guest's records that have to lie where its vCPU ran.
MIN_PRESENCE: Final = 0.95
#: Shifts at which presence is what chance makes it (ns).
_SHIFTS: Final = (-900_000_000, -110_000_000, -13_000_000, 17_000_000, 130_000_000, 1_100_000_000)
#: Records that are looked at.
SAMPLE: Final = 20_000

_RUNSTATE: Final = "TRC_SCHED_RUNSTATE_CHANGE"
_INJECTED: Final = "TRC_HVM_INJ_VIRQ"
_ENTRY: Final = "irq_handler_entry"
_EXIT: Final = "irq_handler_exit"
#: The handler of Xen's platform interrupt in Linux (drivers/xen/platform-pci.c).
PLATFORM: Final = "xen-platform-pci"
_FIRST_SPECIAL_DOMAIN: Final = 0x7FF0
_X2APIC_EOI: Final = 0x80B
_LAPIC_EOI: Final = 0xFEE000B0


@dataclass(frozen=True, slots=True)
class Presence:
    """How well a guest's records fit the times at which a domain's vCPUs ran.

    `share` (0..1) of them lie inside, `chance` at other offsets; `dom` is the domain that fits best.
    """

    dom: int
    share: float
    chance: float

    @property
    def fits(self) -> bool:
        """Whether the recordings belong together on this clock."""
        return self.share >= MIN_PRESENCE and self.share > self.chance


@dataclass(frozen=True, slots=True)
class Estimate:
    """guest time - host time lies in [lo, hi] (ns). `vector` of domain `dom` is what the guest's `irq` arrives as."""

    lo: int
    hi: int
    pairs: int
    median_delay_ns: int
    two_sided: bool
    dom: int
    vector: int
    irq: int
    name: str
    score: float


def stamps(records: Records, limit: int = SAMPLE) -> pl.DataFrame:
    """(cpu, t_ns) of at most about `limit` records of all tables, evenly taken, in time order."""
    frames = []
    total = {n: int(records.scan(n).select(pl.len()).collect().item()) for n in sorted(records.tables())}
    step = max(1, sum(total.values()) // limit)
    for name in total:
        frame = records.scan(name).filter(pl.col("cpu").is_not_null()).select(
            pl.col("cpu").cast(pl.Int64), pl.col("t_ns")
        )
        frames.append(frame.gather_every(step).collect())
    return pl.concat(frames).sort("t_ns") if frames else pl.DataFrame(schema={"cpu": pl.Int64, "t_ns": pl.Int64})


def presence(host: Records, guest: pl.DataFrame, difference: int, slack_ns: int = 0) -> Presence | None:
    """Which domain's vCPUs ran when the guest wrote its records (`stamps`), with `difference` = guest - host in ns.

    None when the host's scheduler was not recorded or the recordings do not overlap.
    """
    if _RUNSTATE not in host.tables() or not guest.height:
        return None
    runs = (
        host.scan(_RUNSTATE)
        .filter((pl.col("dom") < _FIRST_SPECIAL_DOMAIN) & ((pl.col("new_state") == 0) | (pl.col("old_state") == 0)))
        .select("dom", pl.col("vcpu").cast(pl.Int64), "t_ns", running=pl.col("new_state") == 0)
        .collect()
        .sort("t_ns", maintain_order=True)
    )
    if not runs.height:
        return None
    first, last = int(runs["t_ns"][0]), int(runs["t_ns"][-1])
    best: Presence | None = None
    for dom in sorted(runs["dom"].unique().to_list()):
        table = {
            int(key[0]): (part["t_ns"].to_numpy(), part["running"].to_numpy())
            for key, part in runs.filter(pl.col("dom") == dom).group_by("vcpu")
        }
        share, seen = _inside(table, guest, difference, first, last, slack_ns)
        if seen < MIN_PAIRS:
            continue
        others = [_inside(table, guest, difference + s, first, last, slack_ns) for s in _SHIFTS]
        chance = [s for s, n in others if n >= MIN_PAIRS]
        found = Presence(int(dom), share, float(np.median(chance)) if chance else 0.0)
        if best is None or found.share > best.share:
            best = found
    return best


def _inside(
    table: dict[int, tuple[Any, Any]], guest: pl.DataFrame, difference: int, first: int, last: int, slack: int
) -> tuple[float, int]:
    """Share of the guest's records at which their vCPU ran, and how many could be looked at."""
    hits = seen = 0
    for key, part in guest.group_by("cpu"):
        t = part["t_ns"].to_numpy() - difference
        t = t[(t >= first) & (t <= last)]
        seen += len(t)
        if key[0] not in table:
            continue
        times, running = table[int(key[0])]
        hit = np.zeros(len(t), dtype=bool)
        for at in {0, slack, -slack}:
            index = np.searchsorted(times, t + at, side="right") - 1
            hit |= (index >= 0) & running[np.maximum(index, 0)]
        hits += int(hit.sum())
    return (hits / seen if seen else 0.0), seen


# -- a constant difference -----------------------------------------------------------------------------------------


def estimate(host: Records, guest: Records) -> Estimate | str:
    """The difference of two clocks that run equally fast, from interrupts; or the reason why there is none."""
    if _INJECTED not in host.tables():
        return f"the hypervisor's recording has no {_INJECTED} to match with"
    if _ENTRY not in guest.tables():
        return f"the guest's recording has no {_ENTRY} to match with"
    entries = guest.scan(_ENTRY).select("seq", "cpu", "t_ns", "irq", pl.col("name").cast(pl.String)).collect()
    platform = entries.filter(pl.col("name").str.contains(PLATFORM, literal=True))
    name = PLATFORM if platform.height >= MIN_PAIRS else ""
    if name:
        irq = int(platform["irq"].mode().sort()[0])
        entries = platform.filter(pl.col("irq") == irq)
    else:
        irq = -1
    found = injected(host)
    best: tuple[float, int, int, int] | None = None
    for (dom, vector), part in sorted(found.group_by("dom", "vector"), key=lambda item: str(item[0])):
        if part.height < MIN_PAIRS:
            continue
        score, lag = _coarse(part["t_ns"].to_numpy(), entries["t_ns"].to_numpy())
        if best is None or score > best[0]:
            best = (score, lag, int(dom), int(vector))
    if best is None or best[0] < MIN_SCORE:
        return "no pattern of the guest's interrupts is found among the injections"
    score, lag, dom, vector = best
    chosen = found.filter((pl.col("dom") == dom) & (pl.col("vector") == vector)).sort("t_ns")
    pairs = _pairs(chosen, entries, lag)
    if pairs.height < MIN_PAIRS:
        return f"only {pairs.height} injections can be matched with their handlers without doubt"
    upper = np.sort(pairs["upper"].to_numpy())
    lower = np.sort(_ends(host, guest, pairs, dom, irq))[::-1]
    delay = int(np.median(upper))
    for cut in range(int(TRIM * len(upper)) + 1):
        if len(lower) >= MIN_PAIRS and lower[cut] <= upper[cut]:
            hi, lo = int(upper[cut]), int(lower[cut])
            return Estimate(lo, hi, len(upper), delay - hi, True, dom, vector, irq, name, score)
    # One side only: the shortest delay is taken for none, and the usual one says how far off that may be.
    hi = int(upper[0])
    return Estimate(2 * hi - delay, hi, len(upper), delay - hi, False, dom, vector, irq, name, score)


def injected(host: Records) -> pl.DataFrame:
    """Injections with their vCPU: seq, cpu, t_ns, until (the next stamp of that CPU), vector, dom, vcpu."""
    frame = host.scan(_INJECTED).select(
        "seq", "cpu", "t_ns", "vector", until=pl.col("t_ns") + pl.col("t_err_ns").cast(pl.Int64)
    )
    return _who(host, frame.collect())


def _who(host: Records, frame: pl.DataFrame) -> pl.DataFrame:
    """Add the vCPU that runs on the recording CPU; records of none are left out."""
    if _RUNSTATE not in host.tables():
        return frame.with_columns(dom=pl.lit(0, pl.UInt16), vcpu=pl.lit(0, pl.UInt16)).clear()
    switches = (
        host.scan(_RUNSTATE).filter(pl.col("new_state") == 0).select("seq", "cpu", "dom", "vcpu").collect().sort("seq")
    )
    joined = frame.sort("seq").join_asof(switches, on="seq", by="cpu", strategy="backward", check_sortedness=False)
    return joined.filter(pl.col("dom").is_not_null() & (pl.col("dom") < _FIRST_SPECIAL_DOMAIN))


def _coarse(host: Times, guest: Times) -> tuple[float, int]:
    """(score, guest - host in ns) at the best coincidence of two trains of events, by cross-correlation."""
    h0, g0 = int(host.min()), int(guest.min())
    span = max(int(host.max()) - h0, int(guest.max()) - g0) + 1
    width = max(BIN_NS, -(-span // MAX_BINS))
    bins = span // width + 1
    size = 1 << (2 * bins + 4).bit_length()

    def train(times: Times, start: int, spread: bool) -> NDArray[np.float64]:
        line = np.zeros(size)
        at = (times - start) // width
        line[at] = 1.0
        if spread:  # an event near the edge of a bin may meet its partner in the next one
            line[at + 1] = 1.0
        return line

    product = np.fft.rfft(train(guest, g0, True)) * np.conj(np.fft.rfft(train(host, h0, False)))
    matches = np.fft.irfft(product, size)
    kernel = np.ones(2 * NEIGHBOURS + 1)
    sums = np.concatenate(([0.0], np.cumsum(np.concatenate((matches[-NEIGHBOURS:], matches, matches[:NEIGHBOURS])))))
    chance = (sums[len(kernel) :] - sums[: -len(kernel)]) / len(kernel)
    score = (matches - chance) / np.sqrt(np.maximum(chance, 0.0) + 1.0)
    top = int(np.argmax(score))
    others = score.copy()
    others[np.arange(top - 20, top + 21) % size] = 0.0
    best = float(score[top])
    if best < MIN_LEAD * float(others.max()):
        return 0.0, 0
    lag = top if top < size // 2 else top - size
    return best, lag * width + g0 - h0


def _pairs(injected: pl.DataFrame, entries: pl.DataFrame, lag: int) -> pl.DataFrame:
    """Injections that come alone, each with the one handler near it.

    `upper` = handler - end of the injection's stamp: the difference of the clocks is at most that.
    """
    t = injected["t_ns"].to_numpy()
    g = np.sort(entries["t_ns"].to_numpy())
    gaps = np.diff(t, prepend=t[0] - 10 * ALONE_NS, append=t[-1] + 10 * ALONE_NS)
    alone = (gaps[:-1] > ALONE_NS) & (gaps[1:] > ALONE_NS)
    first = np.searchsorted(g, t + lag - WINDOW_NS, side="left")
    past = np.searchsorted(g, t + lag + WINDOW_NS, side="right")
    good = alone & (past - first == 1)
    handler = g[np.minimum(first, len(g) - 1)]
    near = injected.with_columns(
        handler=pl.Series(handler), good=pl.Series(good), upper=pl.Series(handler) - pl.col("until")
    ).filter("good")
    # The coarse lag is good to a bin or two; what lies far from the others met another handler by chance.
    if near.height:
        middle = float(near["upper"].median())  # type: ignore[arg-type]
        near = near.filter((pl.col("upper") - middle).abs() < WINDOW_NS / 2)
    return near.sort("seq")


def _ends(host: Records, guest: Records, pairs: pl.DataFrame, dom: int, irq: int) -> Times:
    """handler's end - VM exit of the EOI, for each pair: the difference of the clocks is at least that."""
    nothing: Times = np.zeros(0, np.int64)
    if irq < 0 or _EXIT not in guest.tables():
        return nothing
    parts = []
    if "TRC_HVM_MSR_WRITE" in host.tables():
        parts.append(host.scan("TRC_HVM_MSR_WRITE").filter(pl.col("msr") == _X2APIC_EOI))
    if "TRC_HVM_IOMEM_WRITE" in host.tables():
        parts.append(host.scan("TRC_HVM_IOMEM_WRITE").filter(pl.col("gpa") == _LAPIC_EOI))
    if not parts:
        return nothing
    eois = _who(host, pl.concat([p.select("seq", "cpu", "t_ns") for p in parts]).collect())
    eois = eois.filter(pl.col("dom") == dom).select("seq", "vcpu", eoi="t_ns", eoi_seq="seq").sort("seq")
    ends = (
        guest.scan(_EXIT).filter(pl.col("irq") == irq).select(end="t_ns", handler=pl.col("t_ns")).collect().sort("end")
    )
    joined = (
        pairs.sort("seq")
        .join_asof(eois, on="seq", by="vcpu", strategy="forward", check_sortedness=False)
        .sort("handler")
        .join_asof(ends, on="handler", strategy="forward", check_sortedness=False)
        .filter(pl.col("eoi").is_not_null() & pl.col("end").is_not_null())
    )
    return (joined["end"] - joined["eoi"]).to_numpy()
