"""Event channels: divergence codes (spec S5.4, S5.5) and parameters, declared once."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = [
    "BINDING_MISMATCH",
    "CODES",
    "DELIVERY_DELAY",
    "FIFO_BUSY_STUCK",
    "FIFO_LINKED_UNREACHABLE",
    "FIFO_LOST_QUEUE_CHANGE",
    "FIFO_NO_CONTROL_BLOCK",
    "FIFO_OLD_QUEUE",
    "FIFO_PENDING_UNLINKED",
    "FIFO_PRIORITY_INVERSION",
    "FIFO_QUEUE_CYCLE",
    "FIFO_READY_LOST",
    "HYPERCALL_NOOP",
    "LOST_WAKEUP_BLOCK",
    "MASKED_PENDING_LONG",
    "PARAMETERS",
    "PIGGYBACK",
    "PORT_RANGE",
    "SELECTOR_WITHOUT_UPCALL",
    "SELECTOR_WRONG_VCPU",
    "STRANDED",
    "UPCALL_NO_WORK",
    "UPCALL_WITHOUT_SELECTOR",
]

_SEND = "evtchn.send|evtchn.notify|evtchn.snapshot"
_BIND = "evtchn.bind|guest.bind_cpu|evtchn.rebind|evtchn.snapshot"

STRANDED: Final = Code(
    "evtchn-stranded-pending", "error", "E1 E3 E4 E5", "Xen evtchn_2l_set_pending, Linux evtchn_2l_handle_events",
    "A port is pending and not masked, the selector bit of its word is clear on the vCPU the guest "
    "handles it on, and no scan of that vCPU is running.",
    "The selector bit was set on the unmasking vCPU, on the vCPU of a disagreeing hypervisor binding, or "
    "before a rebind: nobody will look at the word until another event of the same word arrives.",
    "between the steps of E1; scan in progress; guest binding unknown",
    (_SEND, "evtchn.unmask|evtchn.snapshot", "evtchn.upcall|evtchn.snapshot", "evtchn.handled|evtchn.snapshot", _BIND),
    ("strand_ns",),
)  # fmt: skip
SELECTOR_WRONG_VCPU: Final = Code(
    "evtchn-selector-wrong-vcpu", "warn", "E1 E3", "Linux unmask_evtchn (2005), Xen evtchn_2l_set_pending",
    "A selector bit went 0 to 1 on a vCPU that does not handle the port that caused it.",
    "A port was unmasked from a foreign vCPU without the hypercall, or the two bindings disagree.",
    "rebind within rebind_ns; another ready port of the word is bound to that vCPU",
    (_SEND, _BIND), ("rebind_ns",),
)  # fmt: skip
UPCALL_NO_WORK: Final = Code(
    "evtchn-upcall-no-work", "info", "E2", "Linux evtchn_2l_handle_events",
    "An upcall scanned its selector words and dispatched no port.",
    "The selector bit belonged to a port of another vCPU, or an earlier scan drained it.",
    "nested upcall; port masked between notification and scan",
    ("evtchn.upcall", "evtchn.upcall_end", "evtchn.handled"),
)  # fmt: skip
PIGGYBACK: Final = Code(
    "evtchn-piggyback-delivery", "warn", "E2", "Linux evtchn_2l_handle_events",
    "A stranded port was dispatched by a scan that another port of its word had caused.",
    "The event was delivered only by luck: the delay depends on unrelated traffic in the same selector word.",
    "the port rescued itself by its own unmask",
    (_SEND, "evtchn.handled", "evtchn.upcall", _BIND),
)  # fmt: skip
SELECTOR_WITHOUT_UPCALL: Final = Code(
    "evtchn-selector-without-upcall", "error", "E2", "Linux evtchn_2l_handle_events, xen_hypervisor_callback",
    "A selector is not empty although no upcall is pending and none is running.",
    "upcall_pending was cleared after the selector was exchanged, or without a barrier; or a write was lost.",
    "between the steps of E1 and E3",
    ("evtchn.snapshot|evtchn.upcall", _SEND), ("strand_ns",), closed=False,
)  # fmt: skip
UPCALL_WITHOUT_SELECTOR: Final = Code(
    "evtchn-upcall-without-selector", "info", "E2", "Linux evtchn_2l_handle_events",
    "An upcall is pending although the selector is empty.", "A running scan drained the selector.",
    "always benign", ("evtchn.snapshot|evtchn.upcall",), ("strand_ns",), closed=False,
)  # fmt: skip
BINDING_MISMATCH: Final = Code(
    "evtchn-binding-mismatch", "warn", "E5", "Xen evtchn_bind_vcpu, Linux bind_evtchn_to_cpu",
    "The vCPU that the hypervisor notifies is not the one the guest handles the port on; error when a "
    "port strands by it.",
    "The guest changed one side only, or restored one side only after a resume.", "rebind in progress",
    ("evtchn.bind_vcpu|evtchn.snapshot", "guest.bind_cpu|evtchn.snapshot"), ("rebind_ns",), closed=False,
)  # fmt: skip
DELIVERY_DELAY: Final = Code(
    "evtchn-delivery-delay", "warn", "E1 E2", "Linux evtchn_2l_handle_events",
    "A port stayed pending and not masked for longer than delay_ns while its vCPU was running.",
    "Upcalls are masked for long, the scan is unfair, or the port is stranded.", "vCPU not running",
    (_SEND, "evtchn.handled", _BIND, "sched.run"), ("delay_ns",), closed=False,
)  # fmt: skip
MASKED_PENDING_LONG: Final = Code(
    "evtchn-masked-pending-long", "info", "E1", "Linux evtchn_2l_mask",
    "A port has been pending and masked for longer than masked_ns.", "Its handler or driver never unmasked it.",
    "user space event-channel device waiting for its reader", (_SEND, "evtchn.mask|evtchn.snapshot"),
    ("masked_ns",), closed=False,
)  # fmt: skip
HYPERCALL_NOOP: Final = Code(
    "evtchn-unmask-hypercall-noop", "warn", "E4", "Xen evtchn_2l_unmask",
    "EVTCHNOP_unmask found the mask bit already clear while the port was pending: it then notifies "
    "nobody. Error when the port strands by it.",
    "The guest cleared the mask bit itself before the hypercall.", "selector already set on the notified vCPU",
    ("evtchn.unmask_hypercall", "evtchn.unmask|evtchn.snapshot", _SEND), ("strand_ns",), closed=False,
)  # fmt: skip
PORT_RANGE: Final = Code(
    "evtchn-port-range", "error", "S5.1", "Xen public/event_channel.h EVTCHN_2L_NR_CHANNELS",
    "A port number is beyond what the ABI can hold (B * B for two levels, 2^17 for FIFO).",
    "Wrong word width or wrong ABI assumed.",
    "", ("evtchn.send|evtchn.handled|evtchn.unmask|evtchn.bind",), closed=False,
)  # fmt: skip
LOST_WAKEUP_BLOCK: Final = Code(
    "evtchn-lost-wakeup-block", "error", "E1", "Xen vcpu_block, local_events_need_delivery",
    "A vCPU blocked, and stayed so, with an upcall pending and upcalls not masked.",
    "The test for pending events and the blocking raced.", "block returns immediately",
    ("sched.stop", "sched.run", "evtchn.upcall|evtchn.snapshot", _SEND), ("strand_ns",), closed=False,
)  # fmt: skip
FIFO_PENDING_UNLINKED: Final = Code(
    "fifo-pending-unlinked", "error", "F1 F3", "Xen evtchn_fifo_set_pending, Linux evtchn_fifo_unmask",
    "An event is PENDING and not MASKED, but not LINKED into any queue.",
    "The unmask hypercall was left out, or linking was lost.", "within F1, F2 or its handler",
    ("fifo.word|evtchn.send",), ("strand_ns",),
)  # fmt: skip
FIFO_LINKED_UNREACHABLE: Final = Code(
    "fifo-linked-unreachable", "error", "F1 F2", "Linux consume_one_event, Xen evtchn_fifo_set_pending",
    "An event is LINKED, but no queue's head leads to it.", "A LINK or head write was lost, or a tail was stale.",
    "within F1 or F2", ("fifo.word", "fifo.head"), ("strand_ns",),
)  # fmt: skip
FIFO_QUEUE_CYCLE: Final = Code(
    "fifo-queue-cycle",
    "error",
    "F1 F2", "Linux consume_one_event", "Following LINK from a queue's head comes back to an event already seen.",
    "An event was linked twice.", "", ("fifo.word", "fifo.head"),
)  # fmt: skip
FIFO_READY_LOST: Final = Code(
    "fifo-ready-lost", "error", "F1 F2", "Xen evtchn_fifo_set_pending, Linux __evtchn_fifo_handle_events",
    "A queue holds events, its ready bit is clear and the vCPU is not consuming.",
    "The ready bit was cleared after the queue had been looked at.", "vCPU inside its loop",
    ("fifo.word", "fifo.head", "fifo.ready"), ("strand_ns",),
)  # fmt: skip
FIFO_BUSY_STUCK: Final = Code(
    "fifo-busy-stuck", "warn", "F1", "Xen evtchn_fifo_set_link", "BUSY stays set for longer than busy_ns.",
    "The hypervisor was held up while linking; the guest's unmask spins.", "", ("fifo.word",), ("busy_ns",),
)  # fmt: skip
FIFO_PRIORITY_INVERSION: Final = Code(
    "fifo-priority-inversion", "warn", "F2", "Linux __evtchn_fifo_handle_events",
    "An event was dispatched while the ready bit of a queue of higher priority had been set before this step.",
    "The guest did not read the ready word again between two steps.",
    "", ("evtchn.handled", "fifo.ready|evtchn.send"),
)  # fmt: skip
FIFO_OLD_QUEUE: Final = Code(
    "fifo-old-queue-delivery", "info", "F4", "Xen evtchn_fifo_set_pending, lock_old_queue",
    "An event was dispatched from the queue it was linked on before it was rebound or its priority changed.",
    "Rebinding while LINKED: allowed.",
    "always legal", ("evtchn.handled", "evtchn.bind_vcpu|evtchn.rebind"), closed=False,
)  # fmt: skip
FIFO_LOST_QUEUE_CHANGE: Final = Code(
    "fifo-lost-queue-change", "error", "F1", "Xen lock_old_queue",
    "The queue of an event changed so often that the hypervisor gave up after three attempts to lock it.",
    "The port was rebound again and again while events arrived.", "", ("fifo.word",), closed=False,
)  # fmt: skip
FIFO_NO_CONTROL_BLOCK: Final = Code(
    "fifo-no-control-block", "warn", "F1", "Xen evtchn_fifo_set_pending",
    "An event was sent to a vCPU that has not registered its control block.",
    "The vCPU came online without EVTCHNOP_init_control.",
    "vCPU never seen", ("evtchn.send", "evtchn.bind_vcpu|evtchn.bind"),
    closed=False,
)  # fmt: skip

CODES: Final = (
    STRANDED, SELECTOR_WRONG_VCPU, UPCALL_NO_WORK, PIGGYBACK, SELECTOR_WITHOUT_UPCALL, UPCALL_WITHOUT_SELECTOR,
    BINDING_MISMATCH, DELIVERY_DELAY, MASKED_PENDING_LONG, HYPERCALL_NOOP, PORT_RANGE, LOST_WAKEUP_BLOCK,
    FIFO_PENDING_UNLINKED, FIFO_LINKED_UNREACHABLE, FIFO_QUEUE_CYCLE, FIFO_READY_LOST, FIFO_BUSY_STUCK,
    FIFO_PRIORITY_INVERSION, FIFO_OLD_QUEUE, FIFO_LOST_QUEUE_CHANGE, FIFO_NO_CONTROL_BLOCK,
)  # fmt: skip

PARAMETERS: Final = (
    Parameter("bits_per_word", 64, "bits", "the guest's unsigned long: 64, or 32 for 32-bit guests"),
    Parameter("hvm", False, "", "HVM-type domain: Linux unmasks pending local ports by hypercall (policy modern)"),
    Parameter("upcall_ns", 100, "ns", "notification to upcall, in closed runs; recordings: each send's own, else the "
              "median"),
    Parameter("match_ns", 2_000, "ns", "how far a predicted dispatch may lie from the recorded one"),
    Parameter("strand_ns", 10_000, "ns", "how long an inconsistent state may last before it is reported"),
    Parameter("rebind_ns", 10_000, "ns", "how long the two bindings may differ around a rebind"),
    Parameter("delay_ns", 10_000_000, "ns", "pending to handled on a running vCPU"),
    Parameter("masked_ns", 1_000_000_000, "ns", "pending and masked"),
    Parameter("disagree_percent", 5, "%", "share of sampled words that may differ from the model; beyond it, finding "
              "nothing proves nothing"),
    Parameter("busy_ns", 100_000, "ns", "BUSY held on a FIFO event word"),
)  # fmt: skip
