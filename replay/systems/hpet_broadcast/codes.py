"""Divergence codes and parameters of HPET broadcast (spec S1.7)."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = [
    "AFFINITY_STALE",
    "BAD_CHOICE",
    "BLOCKED_BY_ISR",
    "CODES",
    "EARLY_WAKEUP",
    "IPI_ELIDED_UNSAFE",
    "LATE_WAKEUP",
    "LOST_WAKEUP",
    "MASKED_EXPIRY",
    "MISSED_WAKEUP",
    "NESTED_IRQ",
    "ORPHAN_MEMBER",
    "OWNER_NOT_IDLE",
    "PARAMETERS",
    "RETARGET",
    "SPURIOUS_IRQ",
    "STACK_DEPTH",
    "WRONG_CPU",
]

_HANDLER: Final = ("hpet.handler.begin|hpet.fire",)
#: Whether a wake was the broadcast's cannot be told without its handlers.
_IDLE: Final = ("idle.enter", "idle.exit|idle.break", *_HANDLER)

WRONG_CPU: Final = Code(
    "hpet-wrong-cpu",
    "error",
    "A6",
    "Xen hpet_interrupt_handler, set_channel_irq_affinity",
    "A channel's interrupt was taken on a CPU that does not own the channel.",
    "The channel was handed over through the IRQ migration machinery: the move was refused, or had not completed.",
    "the owner is unknown; the message was already in flight when the channel was retargeted (then info)",
    needs=(*_HANDLER, "hpet.retarget|hpet.fire"),
    thresholds=("inflight_ns",),
)
AFFINITY_STALE: Final = Code(
    "hpet-affinity-stale",
    "warn",
    "A5",
    "Xen set_channel_irq_affinity, hpet_msi_set_affinity, irq move in progress",
    "A channel got a new owner, but its interrupt could not be moved there.",
    "A second move before any interrupt arrived through the new vector is refused (-EAGAIN).",
    "the policy does not move interrupts",
    needs=("hpet.retarget", "hpet.program"),
)
NESTED_IRQ: Final = Code(
    "hpet-nested-irq",
    "warn",
    "A6",
    "Xen do_IRQ: ack before the action, action with interrupts on",
    "An HPET handler was entered on top of another HPET handler.",
    "EOI before the handler and interrupts enabled inside it.",
    "the intervals overlap only because exit records were lost",
    needs=("hpet.handler.begin", "hpet.handler.end"),
)
STACK_DEPTH: Final = Code(
    "hpet-stack-depth",
    "error",
    "A6",
    "Xen do_IRQ: one stack frame for each nested handler",
    "More handlers were running inside each other than `stack_limit` allows.",
    "As hpet-nested-irq, with several channels pointing at one CPU.",
    needs=("hpet.handler.begin", "hpet.handler.end"),
    thresholds=("stack_limit",),
)
BLOCKED_BY_ISR: Final = Code(
    "hpet-blocked-by-isr",
    "warn",
    "A6",
    "Intel SDM vol. 3A, processor priority; Xen ACKTYPE_EOI guest interrupts",
    "The channel fired, but a vector of the same or a higher class was in service, so it had to wait in IRR.",
    "A level interrupt that belongs to a guest waits for the guest's EOI.",
    "the blocker is a handler of the hypervisor itself and shorter than 50 us",
    needs=("hpet.fire", "isr.begin", "isr.end"),
)
LATE_WAKEUP: Final = Code(
    "hpet-late-wakeup",
    "warn",
    "A6-A8",
    "Xen hpet_broadcast_enter, handle_hpet_broadcast",
    "A CPU woke more than `slop_ns` after its deadline (error beyond ten times that).",
    "Blocked vector, interrupt on the wrong CPU, doubled delta of a forced program, or a lost wake.",
    "the deadline is unknown or was moved by a timer set meanwhile; the C-state's exit latency explains it",
    needs=_IDLE,
    thresholds=("slop_ns",),
)
MISSED_WAKEUP: Final = Code(
    "hpet-missed-wakeup",
    "error",
    "A6-A8",
    "Xen hpet_broadcast_enter; time_calibration and the NMI watchdog are the usual rescuers",
    "A CPU was still asleep `miss_ns` after its deadline, or something unrelated woke it after the deadline.",
    "Lost mwait store, a member without an owner, or a comparator that was missed.",
    "the deadline is unknown or was moved by a timer set meanwhile",
    needs=_IDLE,
    thresholds=("miss_ns", "slop_ns"),
)
EARLY_WAKEUP: Final = Code(
    "hpet-early-wakeup",
    "info",
    "A7, B6, B8",
    "Xen handle_hpet_broadcast",
    "The HPET or a channel's owner woke a CPU more than `slop_ns` before its deadline.",
    "The price of sharing a channel.",
    "the CPU has several deadlines",
    needs=_IDLE,
    thresholds=("slop_ns",),
)
SPURIOUS_IRQ: Final = Code(
    "hpet-spurious-irq",
    "warn",
    "A8",
    "Xen hpet_detach_channel",
    "A channel fired that nobody owns or relies on.",
    "The channel was released with its comparator still armed.",
    "the first interrupt after boot; release and fire closer together than the clocks can tell",
    needs=(*_HANDLER, "hpet.program|idle.exit"),
)
RETARGET: Final = Code(
    "hpet-retarget",
    "info",
    "A5, B4",
    "Xen set_channel_irq_affinity",
    "A channel's interrupt was pointed at another CPU (error under `proposed`, which never does that).",
    "Ownership was handed over, or the channel was taken by another CPU.",
    "resume from S3",
    needs=("hpet.retarget",),
    closed=False,
)
MASKED_EXPIRY: Final = Code(
    "hpet-masked-expiry",
    "info",
    "A5",
    "Xen set_channel_irq_affinity: mask, move, unmask, check next_event",
    "A deadline passed while the channel was masked for a move; the handler was run inline.",
    "The window of the affinity update.",
    needs=("hpet.program", "hpet.retarget"),
    closed=False,
)
ORPHAN_MEMBER: Final = Code(
    "hpet-orphan-member",
    "error",
    "A7, A8",
    "Xen hpet_detach_channel, handle_hpet_broadcast",
    "A CPU sleeps on a channel that has no owner or will fire too late for it.",
    "A race in the handover, or an unforced program that failed.",
    "the record that programmed the channel is missing",
    needs=("idle.enter", "hpet.program", "hpet.retarget"),
    closed=False,
)
OWNER_NOT_IDLE: Final = Code(
    "hpet-owner-not-idle",
    "warn",
    "B6",
    "the proposal of 2013: the owner gives the channel up when it wakes",
    "A channel is owned by a CPU that is not idle.",
    "The owner's exit path did not give the channel up.",
    "the 20 us between the wake and the exit path; policy proposed-keep",
    needs=("idle.enter", "idle.exit", "hpet.program"),
    closed=False,
)
BAD_CHOICE: Final = Code(
    "hpet-bad-choice",
    "info",
    "A1, B2, B3",
    "Xen hpet_get_channel",
    "Another channel would have suited the CPU's deadline better than the one that was picked.",
    "Round-robin picking does not look at deadlines.",
    needs=("idle.enter", "hpet.program"),
    closed=False,
)
LOST_WAKEUP: Final = Code(
    "mwait-lost-wakeup",
    "error",
    "S1.6",
    "Xen mwait_idle, cpuidle_wakeup_mwait, arch_set_softirq",
    "A wake-up was posted by a memory write that the sleeper neither monitored nor looked at before MWAIT.",
    "The mwait flag does not live in the monitored line: the waker saw the flag of an earlier sleep.",
    "arming or the store is not recorded (then warn, confidence 40)",
    needs=("wake.sample", "wake.store", "idle.enter"),
)
IPI_ELIDED_UNSAFE: Final = Code(
    "mwait-ipi-elided-unsafe",
    "warn",
    "S1.6",
    "Xen cpuidle_wakeup_mwait",
    "No IPI was sent although the mwait flag was clear at the moment of the store.",
    "As mwait-lost-wakeup; this time the sleeper happened to look.",
    needs=("wake.sample", "wake.store", "idle.enter"),
    closed=False,
)

CODES: Final = (
    WRONG_CPU,
    AFFINITY_STALE,
    NESTED_IRQ,
    STACK_DEPTH,
    BLOCKED_BY_ISR,
    LATE_WAKEUP,
    MISSED_WAKEUP,
    EARLY_WAKEUP,
    SPURIOUS_IRQ,
    RETARGET,
    MASKED_EXPIRY,
    ORPHAN_MEMBER,
    OWNER_NOT_IDLE,
    BAD_CHOICE,
    LOST_WAKEUP,
    IPI_ELIDED_UNSAFE,
)

PARAMETERS: Final = (
    Parameter("n_channels", 1, "", "HPET channels that can deliver messages (0: one legacy channel)"),
    Parameter("n_cpus", 2, "", "CPUs that use the broadcast"),
    Parameter("slop_ns", 50_000, "ns", "timer slop: a wake this much after its deadline is on time"),
    Parameter("min_delta_ns", 20_000, "ns", "shortest delta that is written to a comparator"),
    Parameter("max_delta_ns", 10_000_000_000, "ns", "longest delta that is written to a comparator"),
    Parameter("handler_ns", 2_000, "ns", "what-if: how long a broadcast handler runs"),
    Parameter("rewake_busy_ns", 10_000, "ns", "what-if: how long a CPU that woke too early stays awake"),
    Parameter("miss_ns", 400_000_000, "ns", "asleep this long after the deadline is a missed wake-up"),
    Parameter("stack_limit", 2, "frames", "deepest nesting of HPET handlers that is not an error"),
    Parameter("hpet_vector", 0x30, "", "vector of the channels under current and upstream-2025"),
    Parameter("direct_vector", 0xF1, "", "vector of the channels under the proposed policies"),
    Parameter("step_ns", 100, "ns", "mwait sub-model: time between the sleeper's steps"),
    Parameter("mwait", "", "", "mwait hand-shake: separate-flag, cmpxchg or ipi (empty: the policy's own)"),
    Parameter("inflight_ns", 500, "ns", "a message this close after a retarget was already in flight"),
    Parameter("exit_latency_ns", 200_000, "ns", "recordings: C-state exit latency that is not counted as late"),
    Parameter("exit_path_ns", 100_000, "ns", "recordings: a CPU may own a channel this long around its sleep"),
    Parameter("fixed_owners", False, "", "recordings: a channel belongs to one CPU for good, asleep or not (Linux)"),
    Parameter("remote_wake_ns", 1_000_000, "ns", "recordings: a handler wakes other CPUs within this"),
)
