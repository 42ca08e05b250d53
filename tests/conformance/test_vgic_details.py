"""The virtual GIC step by step: what is done, in which order, by which CPU (spec S3.3, S3.4); limits; hooks."""

from __future__ import annotations

from typing import Any

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import KIND_ID, KINDS, NIL, NONE, events_from_json
from replay.hardware.gic_list_registers import (
    ACTIVE,
    BOTH,
    INVALID,
    PENDING,
    SPURIOUS,
    ListRegisters,
    lr_word,
)
from replay.sink import Sink
from replay.systems import SYSTEMS
from replay.systems.vgic.policies import Maintenance, Merged, Naive, Policy
from tests.conformance.test_vgic_rules import (
    CLEAR,
    HW40,
    LOADED,
    MIGRATE,
    WRITE,
    codes,
    ev,
    found,
    opened,
    replay,
)

VGIC = SYSTEMS["vgic"]
Step = tuple[Any, ...]


def logged(events: list[dict[str, Any]], policy: type[Any], **config: Any) -> list[Step]:
    """Everything that happens in a closed run: (t, kind, cpu, vcpu, obj, tgt), and val where there is one."""
    machine: Any = VGIC.make(policy(), Config(VGIC.parameters, config), Sink(closed=True), "")
    machine.log = []
    numbers = [{**e, "t_ns": e["t"], "kind": KIND_ID[e["kind"]], "seq": n} for n, e in enumerate(events)]
    machine.consume(tuple(e.get(c, NIL if c == "val" else NONE) for c in machine.columns) for e in numbers)
    machine.finish(1_000_000)
    steps = [(t, KINDS[k].name.removeprefix("vgic."), *where, val) for k, t, *where, val in machine.log]
    return [step[:-1] if step[-1] == NIL else step for step in steps]


def under(policy: type[Any], events: list[dict[str, Any]], *, end: int = 1_000_000, **config: Any) -> Run:
    """A closed run under a policy of one's own."""
    return run_machine(
        VGIC, "patch-v8", [events_from_json(events)], config=Config(VGIC.parameters, config), closed=True, t_end=end,
        policy_class=policy,
    )  # fmt: skip


# -- GICH and GICV, bit by bit -------------------------------------------------------------------------------------

VMCR_RESET = 2 << 21 | 3 << 18


def test_registers_after_reset() -> None:
    lrs = ListRegisters(3)
    assert (lrs.words, lrs.hcr, lrs.vmcr, lrs.apr, lrs.count) == ([0, 0, 0], 0, VMCR_RESET, 0, 3)
    assert (lrs.running_priority(), lrs.mask(), lrs.best_pending(), lrs.signalled()) == (0x100, 0, -1, False)


def test_words_of_list_registers() -> None:
    assert lr_word(40, PENDING, 0xA0) == 1 << 28 | 0x14 << 23 | 40
    assert lr_word(40, PENDING, 0xA0, eoi=True) == 1 << 28 | 0x14 << 23 | 1 << 19 | 40
    assert lr_word(40, ACTIVE, 0xA7, physical=0) == 1 << 31 | 2 << 28 | 0x14 << 23 | 40
    assert lr_word(40, BOTH, 0, physical=0x3FF, eoi=True) == 1 << 31 | 3 << 28 | 0x3FF << 10 | 40


def test_vmcr_keeps_its_binary_points_and_gicv_writes_its_fields() -> None:
    lrs = ListRegisters(1)
    lrs.write_vmcr(0xF8000001)
    assert lrs.vmcr == 0xF8000001 | VMCR_RESET
    lrs.write_vmcr(7 << 21 | 6 << 18)
    assert lrs.vmcr == 7 << 21 | 6 << 18
    lrs.write_vmcr(4 << 21 | 4 << 18 | 1 << 24)
    assert lrs.vmcr == 4 << 21 | 4 << 18 | 1 << 24
    lrs.write_vmcr(0)
    assert lrs.write_virtual(0x0, 0xFFFFF) == -1
    assert lrs.vmcr == VMCR_RESET | 0x3FF
    assert lrs.write_virtual(0x4, 0xFF) == -1
    assert (lrs.vmcr, lrs.mask()) == (VMCR_RESET | 0x3FF | 0x1F << 27, 0xF8)
    assert lrs.write_virtual(0x4, 0x80) == -1
    assert (lrs.vmcr >> 27, lrs.mask()) == (0x10, 0x80)
    assert lrs.write_virtual(0x8, 3) == -1  # not modelled
    assert (lrs.vmcr >> 27, lrs.vmcr & 0x3FF) == (0x10, 0x3FF)


def opened_registers(count: int = 2) -> ListRegisters:
    lrs = ListRegisters(count)
    lrs.hcr = 1
    lrs.write_vmcr(0xF8000001)
    return lrs


def test_maintenance_status() -> None:
    lrs = opened_registers(3)
    lrs.write(0, lr_word(40, INVALID, 0xA0, eoi=True))
    lrs.write(1, lr_word(41, INVALID, 0xA0, physical=0x200))  # its bit 19 belongs to the physical id
    lrs.write(2, lr_word(42, ACTIVE, 0xA0, eoi=True))
    assert (lrs.eisr(), lrs.elrsr(), lrs.valid(), lrs.misr()) == (0b001, 0b010, 1, 1)
    lrs.write(2, lr_word(42, PENDING, 0xA0, eoi=True))
    assert (lrs.eisr(), lrs.elrsr(), lrs.valid()) == (0b001, 0b010, 1)
    for n in range(3):
        lrs.write(n, lr_word(40 + n, ACTIVE, 0xA0))
    for hcr, valid, misr in ((1 << 1, 2, 0), (1 << 1, 1, 2), (1 << 1, 0, 2), (1, 0, 0)):
        lrs.hcr = hcr
        for n in range(3):
            lrs.write(n, lr_word(40 + n, ACTIVE if n < valid else INVALID, 0xA0))
        assert (lrs.valid(), lrs.misr()) == (valid, misr)
    for n in range(3):
        lrs.write(n, lr_word(40 + n, ACTIVE, 0xA0))
    for hcr, misr in (
        (1 << 2, 0), (1 << 2 | 1 << 27, 4), (1 << 2 | 1 << 31, 4), (1 << 27, 0), (1 << 3, 8), (1 << 2 | 1 << 26, 0),
        (1 << 4, 0), (1 << 4 | 1 << 27, 0),
    ):  # fmt: skip
        lrs.hcr = hcr
        assert lrs.misr() == misr
    lrs.hcr = 1 << 3
    for state, misr in ((PENDING, 0), (BOTH, 0), (ACTIVE, 8)):
        lrs.write(1, lr_word(41, state, 0xA0))
        assert lrs.misr() == misr


def test_virtual_acknowledge_drop_and_deactivation() -> None:
    lrs = opened_registers()
    lrs.write(0, lr_word(16, PENDING, 0xA0) | 2 << 10)
    assert lrs.acknowledge_virtual() == 16  # only SGIs carry a source
    assert (lrs.apr, lrs.state(0)) == (1 << 20, ACTIVE)
    lrs.write(1, lr_word(15, PENDING, 0x80) | 5 << 10)
    assert lrs.acknowledge_virtual() == 15 | 5 << 10
    assert lrs.apr == 1 << 20 | 1 << 16
    assert lrs.write_virtual(0x10, 1020) == -1  # special: nothing is dropped
    assert lrs.apr == 1 << 20 | 1 << 16
    assert lrs.write_virtual(0x10, 15) == -1
    assert (lrs.apr, lrs.state(1), lrs.hcr) == (1 << 20, INVALID, 1)
    lrs.write(1, lr_word(3, PENDING, 0x80, physical=60))
    assert lrs.acknowledge_virtual() == 3  # HW=1: bits 12:10 are of the physical id
    lrs.write_virtual(0x0, 0x201)  # EOImode=1
    assert lrs.write_virtual(0x10, 3) == -1
    assert (lrs.apr, lrs.state(1)) == (1 << 20, ACTIVE)
    assert lrs.write_virtual(0x1000, 3) == 60
    assert lrs.state(1) == INVALID
    lrs.write(1, lr_word(1019, ACTIVE, 0x80, physical=0))
    lrs.write_virtual(0x0, 1)
    assert lrs.write_virtual(0x10, 1019) == 0


def test_an_end_without_a_list_register_is_counted() -> None:
    lrs = opened_registers()
    for count in (1, 2, 3):
        assert lrs.write_virtual(0x10, 40) == -1
        assert lrs.hcr == 1 | count << 27
    lrs.hcr = 1 | 0x1F << 27
    assert lrs.write_virtual(0x1000, 40) == -1
    assert (lrs.hcr, lrs.apr) == (1, 0)  # five bits
    lrs.hcr = 0
    assert lrs.write_virtual(0x10, 40) == -1
    assert lrs.hcr == 0
    lrs.write(0, lr_word(40, PENDING, 0xA0))  # not active
    lrs.hcr = 1
    lrs.write_virtual(0x1000, 40)
    assert (lrs.state(0), lrs.hcr) == (PENDING, 1 | 1 << 27)


def test_what_is_signalled() -> None:
    lrs = opened_registers()
    lrs.write(0, lr_word(40, BOTH, 0x80))
    lrs.write(1, lr_word(41, PENDING, 0xA0))
    assert (lrs.best_pending(), lrs.signalled()) == (1, True)  # pending and active does not count
    lrs.write_virtual(0x4, 0xA0)
    assert lrs.signalled() is False
    lrs.write_virtual(0x4, 0xA8)
    assert lrs.signalled() is True
    lrs.apr = 1 << 20
    assert (lrs.running_priority(), lrs.signalled(), lrs.acknowledge_virtual()) == (0xA0, False, SPURIOUS)
    lrs.apr = 1 << 21
    assert lrs.signalled() is True
    for hcr, vmcr, signalled in ((1, 2, True), (1, 4, False), (2, 1, False), (1, 1, True)):
        lrs.hcr = hcr
        lrs.write_vmcr(0xF8000000 | vmcr)
        assert lrs.signalled() is signalled
    lrs.apr = 0
    lrs.write(0, lr_word(42, PENDING, 0xF8))
    lrs.write(1, lr_word(43, PENDING, 0xF8))
    assert lrs.best_pending() == 0


# -- what happens, in order ----------------------------------------------------------------------------------------

LR40 = 0x9A00A028  # pending, HW, physical 40, priority 0xa0
EDITED = 0x2A080028  # active, HW=0, EOI
TAKEN: list[Step] = [
    (0, "phys_irq", -1, -1, 40, -1), (0, "hyp_entry", 0, 0, -1, -1), (0, "inject", 0, 0, 40, -1),
    (0, "lr_write", 0, 0, 40, 0, LR40), (0, "hyp_exit", 0, 0, -1, -1), (500, "ack", 0, 0, 40, -1),
]  # fmt: skip


def test_steps_of_the_maintenance_policy() -> None:
    """The edit is made once, at the first entry; the latched edge arrives at the new CPU while the old one is still in
    the hypervisor."""
    events = [*MIGRATE[:2], ev(2_600, "hyp_entry", vcpu=0), ev(3_500, "phys_irq", obj=40)]
    assert logged(events, Maintenance) == [
        *TAKEN,
        (2_000, "hyp_entry", 1, 1, -1, -1), (2_000, "itargets", 1, 1, 40, 1), (2_000, "sgi", 1, -1, -1, 0),
        (2_000, "hyp_exit", 1, 1, -1, -1),
        (2_600, "hyp_entry", 0, 0, -1, -1), (2_600, "lr_write", 0, 0, 40, 0, EDITED), (2_600, "hyp_exit", 0, 0, -1, -1),
        (3_000, "hyp_entry", 0, 0, -1, -1), (3_000, "hyp_exit", 0, 0, -1, -1),
        (3_500, "phys_irq", -1, -1, 40, -1),
        (4_500, "eoi", 0, 0, 40, -1), (4_500, "maint", 0, 0, -1, -1, 1), (4_500, "hyp_entry", 0, 0, -1, -1),
        (4_500, "lr_clear", 0, 0, 40, 0), (4_500, "affinity", 0, -1, 40, 1, 0), (4_500, "deactivate", 0, -1, 40, -1),
        (4_500, "hyp_entry", 1, 1, -1, -1), (4_500, "inject", 1, 1, 40, -1), (4_500, "lr_write", 1, 1, 40, 0, LR40),
        (4_500, "hyp_exit", 1, 1, -1, -1), (4_500, "hyp_exit", 0, 0, -1, -1),
        (5_000, "ack", 1, 1, 40, -1), (9_000, "eoi", 1, 1, 40, -1),
    ]  # fmt: skip


def test_steps_of_patch_v8() -> None:
    """The affinity moves with the write; the second interrupt arrives at the new CPU, which kicks the old one."""
    assert logged([*MIGRATE[:2], ev(3_500, "phys_irq", obj=40)], VGIC.policies["patch-v8"]) == [
        *TAKEN,
        (2_000, "hyp_entry", 1, 1, -1, -1), (2_000, "itargets", 1, 1, 40, 1), (2_000, "affinity", 1, -1, 40, 1, 0),
        (2_000, "hyp_exit", 1, 1, -1, -1), (3_500, "phys_irq", -1, -1, 40, -1), (4_500, "eoi", 0, 0, 40, -1),
        (4_500, "hyp_entry", 1, 1, -1, -1), (4_500, "inject", 1, 1, 40, -1), (4_500, "sgi", 1, -1, -1, 0),
        (4_500, "hyp_exit", 1, 1, -1, -1), (5_500, "hyp_entry", 0, 0, -1, -1), (5_500, "lr_clear", 0, 0, 40, 0),
        (5_500, "inject", 0, 1, 40, -1), (5_500, "sgi", 0, -1, -1, 1), (5_500, "hyp_exit", 0, 0, -1, -1),
        (6_500, "hyp_entry", 1, 1, -1, -1), (6_500, "lr_write", 1, 1, 40, 0, LR40), (6_500, "hyp_exit", 1, 1, -1, -1),
        (7_000, "ack", 1, 1, 40, -1), (11_000, "eoi", 1, 1, 40, -1),
    ]  # fmt: skip


def test_two_moves_that_end_in_one_entry() -> None:
    """While 40's latched edge is handled on CPU 1, and afterwards, it is CPU 0 that executes 41's."""
    both = [ev(0, "phys_irq", obj=40), ev(0, "phys_irq", obj=41), ev(600, "itargets", obj=40, vcpu=1, tgt=1),
            ev(700, "itargets", obj=41, vcpu=1, tgt=1), ev(1_000, "sched.stop", cpu=0, vcpu=0),
            *(ev(2_000, "phys_irq", obj=irq) for irq in (40, 41)), ev(9_000, "sched.run", cpu=0, vcpu=0)]  # fmt: skip
    steps = [s for s in logged(both, Maintenance) if s[1] in ("deactivate", "affinity", "maint")]
    assert steps == [
        (9_500, "maint", 0, 0, -1, -1, 1), (9_500, "affinity", 0, -1, 40, 1, 0), (9_500, "deactivate", 0, -1, 40, -1),
        (9_500, "maint", 0, 0, -1, -1, 1), (9_500, "affinity", 0, -1, 41, 1, 0), (9_500, "deactivate", 0, -1, 41, -1),
    ]  # fmt: skip


def test_nobody_executes_the_hypervisor_between_two_entries() -> None:
    """The scheduler moves interrupts along with their vcpu: no vcpu is executing then."""
    moves = [ev(0, "disable", obj=40, vcpu=0), ev(10, "phys_irq", obj=40), ev(100, "enable", obj=40, vcpu=0),
             ev(200, "sched.run", cpu=2, vcpu=0), ev(300, "sched.run", cpu=3, vcpu=0),
             ev(400, "sched.stop", cpu=3, vcpu=0), ev(450, "sched.run", cpu=0, vcpu=0)]  # fmt: skip
    steps = [s for s in logged(moves, Naive) if s[1] == "affinity"]
    assert steps == [(200, "affinity", -1, -1, 40, 2, 0), (300, "affinity", -1, -1, 40, 3, 2),
                     (450, "affinity", -1, -1, 40, 0, 3)]  # fmt: skip
    trapped = [ev(0, "phys_irq", obj=40), ev(10, "hyp_entry", vcpu=0), ev(20, "sched.run", cpu=1, vcpu=0)]
    assert [s for s in logged(trapped, Naive) if s[1] == "affinity"] == [(20, "affinity", -1, -1, 40, 1, 0)]


def test_a_move_that_ends_with_a_context_switch() -> None:
    """It is the old vcpu's CPU that injects, and kicks; back at the old vcpu nobody has to be kicked."""
    moved = [*MIGRATE[:2], ev(4_600, "phys_irq", obj=40), ev(5_000, "sched.stop", cpu=0, vcpu=0)]
    steps = [s for s in logged(moved, VGIC.policies["patch-v8"]) if s[0] == 5_000]
    assert steps == [(5_000, "lr_clear", 0, 0, 40, 0), (5_000, "inject", 0, 1, 40, -1), (5_000, "sgi", 0, -1, -1, 1)]
    back = [*moved[:3], ev(4_700, "itargets", obj=40, vcpu=1, tgt=0), moved[3]]
    steps = [s for s in logged(back, VGIC.policies["patch-v8"]) if s[0] == 5_000]
    assert [s[1] for s in steps] == ["lr_clear", "affinity", "inject", "lr_write"]


def test_an_enable_raises_in_the_name_of_the_writer() -> None:
    """vgic_enable_irqs on the target's own CPU: straight into its list register."""
    events = [ev(0, "disable", obj=40, vcpu=0), ev(10, "phys_irq", obj=40), ev(100, "enable", obj=40, vcpu=0)]
    assert [s[:2] for s in logged(events, Naive) if s[0] >= 100] == [
        (100, "enable"), (100, "lr_write"), (600, "ack"), (4_600, "eoi"),
    ]  # fmt: skip
    other = [*events[:2], ev(100, "enable", obj=40, vcpu=1), ev(200, "hyp_entry", vcpu=0)]
    assert [s[:2] for s in logged(other, Naive) if s[0] >= 100][:3] == [
        (100, "enable"), (200, "hyp_entry"), (200, "lr_write"),
    ]  # fmt: skip


def test_a_context_switch_syncs_and_refills() -> None:
    """Invalid list registers are found when the vcpu is switched out; what waits is loaded when it is back, in its
    own name; what the guest was about to do happens once."""
    lazy = replay([ev(0, "phys_irq", obj=40), ev(5_000, "sched.stop", cpu=0, vcpu=0)])
    assert lazy.metrics["lazy_lr_ns"] == 500
    follow = [ev(0, "priority", obj=40, val=0xA0), ev(0, "sched.stop", cpu=0, vcpu=0),
              ev(10, "sched.run", cpu=1, vcpu=0), ev(20, "phys_irq", obj=40)]  # fmt: skip
    assert (replay(follow).metrics["sgis"], replay(follow).metrics["guest_acks"]) == (0, 1)
    elsewhere = [*follow[:3], ev(15, "itargets", obj=40, vcpu=1, tgt=1)]
    assert replay([*elsewhere, ev(20, "sched.run", cpu=2, vcpu=0)]).metrics["guest_acks"] == 0
    twice = [ev(0, "phys_irq", obj=40), *(ev(t, f"sched.{kind}", cpu=0, vcpu=0) for t, kind in (
        (100, "stop"), (1_000, "run"), (1_100, "stop"), (1_200, "run"), (8_000, "stop"), (9_000, "run")))]  # fmt: skip
    run = replay(twice)
    assert (run.metrics["guest_acks"], run.metrics["max_delivery_ns"]) == (1, 1_500)
    # The vcpu that is switched in evicts what migrates: the new target is kicked from its CPU.
    evicted = [ev(0, "priority", obj=41, val=0x80), ev(0, "phys_irq", obj=40), ev(10, "sched.stop", cpu=0, vcpu=0),
               ev(20, "itargets", obj=40, vcpu=1, tgt=1), ev(30, "itargets", obj=42, vcpu=1, tgt=1),
               ev(40, "itargets", obj=41, vcpu=1, tgt=1), ev(50, "itargets", obj=41, vcpu=1, tgt=0)]  # fmt: skip
    late = [*evicted, ev(60, "sched.run", cpu=3, vcpu=2), ev(70, "phys_irq", obj=41),
            ev(900, "sched.run", cpu=0, vcpu=0)]  # fmt: skip
    steps = logged(late, VGIC.policies["merged"], vcpus=3, nr_lrs=1)
    assert [s for s in steps if s[1] in ("sgi", "lr_clear") and s[0] == 900] == [
        (900, "lr_clear", 0, 0, 40, 0), (900, "sgi", 0, -1, -1, 1),
    ]  # fmt: skip


def test_an_acknowledge_of_what_was_evicted_does_not_happen() -> None:
    """Its list register holds another interrupt by then."""
    events = [ev(0, "priority", obj=41, val=0x80), ev(0, "phys_irq", obj=40), ev(100, "phys_irq", obj=41)]
    steps = [s[:5] for s in logged(events, Naive, nr_lrs=1) if s[1] in ("ack", "eoi")]
    assert steps == [(600, "ack", 0, 0, 41), (4_600, "eoi", 0, 0, 41), (5_100, "ack", 0, 0, 40),
                     (9_100, "eoi", 0, 0, 40)]  # fmt: skip


def test_an_interrupt_that_has_left_is_on_no_list() -> None:
    """45 was taken on vcpu0, and is pending on vcpu1 now: nothing of vcpu0's that could be evicted."""
    events = [
        ev(0, "priority", obj=45, val=0xC0), ev(0, "priority", obj=41, val=0x80), ev(0, "phys_irq", obj=45),
        ev(10_000, "hyp_entry", vcpu=0), ev(10_100, "itargets", obj=45, vcpu=1, tgt=1), ev(20_000, "phys_irq", obj=45),
        ev(20_010, "phys_irq", obj=40), ev(20_020, "phys_irq", obj=41),
    ]  # fmt: skip
    steps = [s[:5] for s in logged(events, VGIC.policies["merged"], nr_lrs=1) if s[0] >= 20_000 and s[1] == "ack"]
    assert steps == [(20_500, "ack", 1, 1, 45), (20_520, "ack", 0, 0, 41), (25_020, "ack", 0, 0, 40)]


# -- hooks of users ------------------------------------------------------------------------------------------------


def test_what_a_policy_does_that_says_nothing() -> None:
    """A write retargets; an arrival is injected; the end of a migration ends it; maintenance does nothing."""

    class Bare(Policy):
        name = "bare"

    plain = under(Bare, [ev(0, "itargets", obj=40, vcpu=0, tgt=1), ev(10, "phys_irq", obj=40)])
    assert (plain.metrics["sgis"], plain.metrics["guest_acks"], plain.metrics["max_delivery_ns"]) == (1, 1, 1_500)

    class Flagging(Policy):
        name = "flagging"

        def on_itargets(self, m: Any, q: Any, writer: int, new: int) -> None:
            super().on_itargets(m, q, writer, new)
            m.begin_migration(q)

    moved = under(Flagging, [*MIGRATE[:2], ev(9_000, "hyp_entry", vcpu=0)], end=50_000_000)
    assert (found(moved), moved.metrics["migrations_quiet"]) == ([], 1)


def test_the_maintenance_hook_is_called_after_the_list_registers_were_synced() -> None:
    seen: list[tuple[int, int, int]] = []

    class Watching(Maintenance):
        def on_maintenance(self, m: Any, v: int) -> None:
            seen.append((m.now, v, m.irqs[0].lr))

    under(Watching, MIGRATE[:2])
    assert seen == [(4_500, 0, -1)]


class Early(Naive):
    """Deactivates as soon as it has injected: what a list register with HW=0 would be."""

    def on_arrival(self, m: Any, q: Any, pcpu: int) -> None:
        m.inject(q.target, q)
        m.deactivate(q)


def test_g3_of_a_list_register_that_the_guest_has_not_ended() -> None:
    """QUEUED is dropped while it is pending; while it is active it has to wait, which HW=1 cannot hold."""
    pending = [ev(0, "phys_irq", obj=40), ev(100, "phys_irq", obj=40), ev(9_000, "hyp_entry", vcpu=0)]
    run = under(Early, pending)
    assert (found(run), run.metrics["guest_acks"], run.metrics["queued_ns"]) == ([], 1, 0)
    active = [pending[0], ev(1_000, "phys_irq", obj=40), ev(9_000, "hyp_entry", vcpu=0)]
    run = under(Early, active)
    assert [(f.t, f.code.name, f.obj, f.vcpu) for f in run.findings] == [(1_000, "vgic-hw-pending-active", 40, 0)]
    assert (run.metrics["guest_acks"], run.metrics["queued_ns"]) == (2, 8_000)
    # From its EOI on it is stranded, until somebody enters.
    late = under(Early, [*active[:2], ev(300_000, "hyp_entry", vcpu=0)])
    assert [(f.t, f.code.name, f.val) for f in late.findings][1:] == [(300_000, "vgic-queued-stranded", 295_500)]


def test_a_policy_that_forgets_what_it_evicted() -> None:
    """It ends the migration and injects nowhere: QUEUED, on no list, from then on."""

    class Dropping(Merged):
        def on_finish(self, m: Any, q: Any, v: int) -> None:
            m.end_migration(q)

    events = [ev(0, "priority", obj=41, val=0x80), ev(0, "phys_irq", obj=40),
              ev(100, "itargets", obj=40, vcpu=0, tgt=1), ev(200, "phys_irq", obj=41)]  # fmt: skip
    run = under(Dropping, events, nr_lrs=1)
    assert [(f.t, f.code.name, f.t_first) for f in run.findings] == [(1_000_000, "vgic-queued-stranded", 200)]


def test_a_policy_that_edits_and_does_not_deactivate_edits_one_list_register_only() -> None:
    """The next one is tied to the physical interrupt again: nothing is deactivated for the guest."""

    class Once(Maintenance):
        def on_itargets(self, m: Any, q: Any, writer: int, new: int) -> None:
            m.set_target(q, new)
            m.begin_migration(q)
            if q.target == 1:
                m.request_edit(q)

        def on_finish(self, m: Any, q: Any, v: int) -> None:
            m.end_migration(q)
            if q.target == 1:
                m.deactivate(q)
            else:
                m.deactivate_for_guest(q)

    events = [*MIGRATE[:2], ev(20_000, "phys_irq", obj=40), ev(23_500, "itargets", obj=40, vcpu=0, tgt=0),
              ev(40_000, "hyp_entry", vcpu=1)]  # fmt: skip
    assert [s for s in logged(events, Once) if s[1] == "deactivate"] == []


def test_two_lists_are_told_once_for_as_long_as_it_lasts() -> None:
    sink = Sink(closed=True)
    machine: Any = VGIC.make(Naive(), Config(VGIC.parameters), sink, "")
    q = machine.irq(NONE, 40)
    counts = []
    for inflight, pending in ((0, 1), (0, 1), (0, 0), (1, 0), (-1, 0), (1, 0), (1, -1), (-2, 1), (0, 1)):
        q.inflight_on, q.lr_pending_on = inflight, pending
        machine.monitor.check(q)
        counts.append(len(sink.findings))
    assert counts == [1, 1, 1, 2, 2, 3, 3, 3, 4]
    assert {f.code.name for f in sink.findings} == {"vgic-two-lists"}


# -- limits --------------------------------------------------------------------------------------------------------


def test_numbers_that_no_guest_has() -> None:
    outside = [ev(0, "hyp_entry", vcpu=4_096), ev(1, "phys_irq", obj=1_020), ev(2, "ack", vcpu=4_096, obj=40),
               ev(3, "itargets", vcpu=0, obj=40, tgt=4_096)]  # fmt: skip
    m = opened(outside).metrics
    assert (m["hyp_entries"], m["phys_edges"], m["guest_acks"], m["itargets_writes"]) == (0, 0, 0, 0)
    inside = [ev(0, "hyp_entry", vcpu=4_095), ev(1, "phys_irq", obj=1_019), ev(2, "ack", vcpu=4_095, obj=0),
              ev(3, "itargets", vcpu=0, obj=0, tgt=4_095)]  # fmt: skip
    m = opened(inside).metrics
    assert (m["hyp_entries"], m["phys_edges"], m["guest_acks"], m["itargets_writes"]) == (1, 1, 1, 1)


def test_between_1_and_64_list_registers() -> None:
    assert replay([ev(0, "phys_irq", obj=40)], nr_lrs=0).metrics["guest_acks"] == 1
    many = [ev(0, "phys_irq", obj=40 + n) for n in range(65)]
    assert replay(many[:64], nr_lrs=100).metrics["max_delivery_ns"] == 500
    assert replay(many, nr_lrs=100).metrics["max_delivery_ns"] > 500
    both = [ev(1_000, "lr_write", vcpu=0, cpu=0, obj=40 + lr, tgt=lr, val=lr_word(40, BOTH, 0, physical=40))
            for lr in (63, 64)]  # fmt: skip
    assert [f.obj for f in opened(both).findings] == [103]


def test_idle_vcpus_are_no_guests() -> None:
    idle = [ev(0, "sched.run", cpu=0, vcpu=0, dom=0x7FFF), ev(10, "maint", cpu=0, val=0)]
    assert [f.vcpu for f in opened(idle, from_boot=False).findings] == [-1]
    guest = [ev(0, "sched.run", cpu=0, vcpu=0, dom=0x7FFE), ev(10, "maint", cpu=0, val=0)]
    assert [f.vcpu for f in opened(guest, from_boot=False).findings] == [0]


def test_domain_1_is_not_the_only_domain() -> None:
    events = [{**LOADED, "dom": 1}, {**LOADED, "dom": 0, "cpu": 1}]
    assert found(opened(events, from_boot=False)) == []
    placed = [ev(0, "sched.run", cpu=dom, vcpu=0, dom=dom) for dom in (1, 2)]
    story = [ev(1_000, "lr_write", vcpu=0, cpu=1, obj=40, tgt=0, val=HW40), ev(1_500, "ack", vcpu=0, obj=40),
             ev(1_600, "eoi", vcpu=0, obj=40), ev(5_000, "inject", vcpu=0, obj=40), ev(5_100, "sgi", cpu=0, tgt=2),
             ev(200_000, "lr_write", vcpu=0, cpu=1, obj=40, tgt=0, val=HW40)]  # fmt: skip
    run = opened([*placed, *(e if e["kind"] == "vgic.sgi" else {**e, "dom": 1} for e in story)])
    assert [(f.code.name, f.val) for f in run.findings if f.code.name == "vgic-queued-stranded"] == [
        ("vgic-queued-stranded", 195_000)
    ]


# -- recordings: what is known, and until when ---------------------------------------------------------------------

ENDED = [ev(1_500, "ack", vcpu=0, obj=40), ev(1_600, "eoi", vcpu=0, obj=40)]
STRANDED = "vgic-queued-stranded"


def reload(t: int, **more: int) -> dict[str, Any]:
    return {**LOADED, "t": t, **more}


def stranded(events: list[dict[str, Any]], **more: Any) -> list[tuple[int, int, int, int]]:
    """(t, vcpu, val, since) of vgic-queued-stranded."""
    run = opened(events, **more)
    return [(f.t, f.vcpu, f.val, f.t_first) for f in run.findings if f.code.name == STRANDED]


def test_stranded_while_it_is_enabled() -> None:
    """The clock runs from the enable to the disable."""
    queued = [LOADED, *ENDED, ev(2_000, "disable", vcpu=0, obj=40), ev(5_000, "inject", vcpu=0, obj=40)]
    enabled = [*queued, ev(20_000, "enable", vcpu=0, obj=40)]
    assert stranded([*queued, reload(200_000)]) == []
    assert stranded([*enabled, reload(200_000)]) == [(200_000, 0, 180_000, 20_000)]
    assert stranded([*enabled, ev(90_000, "disable", vcpu=0, obj=40), reload(200_000)]) == []
    assert stranded([*enabled, ev(121_000, "disable", vcpu=0, obj=40), reload(200_000)]) == [
        (200_000, 0, 180_000, 20_000)
    ]  # fmt: skip
    again = [*enabled, ev(90_000, "disable", vcpu=0, obj=40), ev(95_000, "enable", vcpu=0, obj=40), reload(200_000)]
    assert stranded(again) == [(200_000, 0, 105_000, 95_000)]
    long = [*enabled, ev(130_000, "disable", vcpu=0, obj=40), ev(135_000, "enable", vcpu=0, obj=40), reload(200_000)]
    assert stranded(long) == [(200_000, 0, 180_000, 20_000)]


def test_stranded_until_another_interrupt_has_its_list_register() -> None:
    """After that nobody saw where it is; nor, at the end, on which vcpu."""
    story = [LOADED, *ENDED, ev(5_000, "inject", vcpu=0, obj=40)]
    other = ev(50_000, "lr_write", vcpu=0, cpu=0, obj=41, tgt=0, val=lr_word(41, PENDING, 0xA0, physical=41))
    assert stranded([*story, other, reload(300_000, tgt=1)]) == []
    assert stranded([*story, {**other, "t": 110_000}], end=300_000) == [(300_000, -1, 295_000, 5_000)]
    # Acknowledged on vcpu 1 it was there.
    taken = [*story, {**other, "t": 110_000}, ev(120_000, "ack", vcpu=1, obj=40)]
    assert stranded(taken, end=300_000) == [(300_000, 1, 295_000, 5_000)]
    assert stranded([*story, ev(60_000, "ack", vcpu=1, obj=40)], end=300_000) == []
    # QUEUED counts to the next load that was seen.
    lost = [LOADED, other, ev(60_000, "inject", vcpu=0, obj=40), ev(61_000, "ack", vcpu=0, obj=40), reload(70_000)]
    assert opened(lost).metrics["queued_ns"] == 10_000


def test_kicks_and_what_ends_them() -> None:
    story = [LOADED, *ENDED]
    inject, rescue = ev(5_000, "inject", vcpu=0, obj=40), reload(200_000)
    kick = ev(4_000, "sgi", cpu=1, tgt=0)
    assert stranded([*story, kick, inject, rescue]) == []
    for taken in (ev(4_500, "hyp_entry", vcpu=0), ev(4_500, "sched.run", cpu=0, vcpu=0)):
        assert stranded([*story, kick, taken, inject, rescue]) == [(200_000, 0, 195_000, 5_000)]
    # Records were lost: a kick may be among them.
    after = [ev(900, "trace.lost", val=800), ev(950, "enable", vcpu=0, obj=40), *story]
    assert stranded([*after, inject, rescue]) == []
    assert stranded([*after, ev(1_700, "hyp_entry", vcpu=0), inject, rescue]) == [(200_000, 0, 195_000, 5_000)]
    assert stranded([ev(100, "hyp_entry", vcpu=0), *after, inject, rescue]) == []
    # Nobody saw where the vcpu runs: any kick may have been for it, from before the beginning too.
    late = [{k: v for k, v in e.items() if k != "cpu"} for e in (ev(900, "enable", vcpu=0, obj=40), *story)]
    entry = ev(1_700, "hyp_entry", vcpu=0)
    assert stranded([*late, inject, rescue], from_boot=False) == []
    assert stranded([*late, entry, inject, reload(200_000)], from_boot=False) == [(200_000, 0, 195_000, 5_000)]
    assert stranded([*late, entry, kick, inject, rescue], from_boot=False) == []


def test_a_load_ends_the_clock_of_a_leak() -> None:
    arrived = [ev(500, "phys_irq", obj=40)]
    assert found(opened([*arrived, LOADED], end=3_000_000)) == []
    assert [(f.t, f.vcpu, f.val) for f in opened(arrived, end=3_000_000).findings] == [(1_000_500, -1, 1_000_000)]
    back = [*arrived, LOADED, *ENDED, ev(1_700, "phys_irq", obj=40), CLEAR]
    assert found(opened(back, end=1_002_999)) == []
    assert found(opened(back, end=1_003_000)) == [(1_003_000, "vgic-phys-active-leak")]


def test_a_clear_without_a_cpu_is_a_clear() -> None:
    events = [ev(0, "sched.run", cpu=0, vcpu=0), LOADED, *ENDED, WRITE, {k: v for k, v in CLEAR.items() if k != "cpu"}]
    assert opened(events, policy="merged").extra["vgic_moves"][0]["completed_ns"] == 3_000
    unknown = [LOADED, ev(1_200, "sched.run", cpu=3, vcpu=5), *ENDED, WRITE, {**CLEAR, "cpu": 3, "vcpu": 0}]
    assert codes(opened(unknown)) == {"vgic-lr-foreign-access"}
    stopped = [LOADED, *ENDED, WRITE, ev(2_500, "sched.stop", cpu=0, vcpu=0), {**CLEAR, "cpu": 3}]
    assert opened(stopped, policy="merged").extra["vgic_moves"][0]["completed_ns"] == 3_000


def test_the_affinity_is_looked_at_when_a_migration_ends_and_when_a_vcpu_runs() -> None:
    start = [ev(0, "hyp_entry", vcpu=1), ev(100, "affinity", obj=40, tgt=0)]
    moved = opened([*start, LOADED, *ENDED, WRITE, CLEAR], policy="merged", end=50_000_000)
    assert found(moved) == [(30_003_000, "vgic-affinity-mismatch")]
    runs = [ev(100, "affinity", obj=40, tgt=0), ev(500, "sched.run", cpu=2, vcpu=0)]
    assert found(opened([*start, LOADED, WRITE], policy="merged", end=50_000_000)) == [
        (10_002_000, "vgic-migrating-stuck")  # and nothing else while it lasts
    ]  # fmt: skip
    assert found(opened(runs, end=50_000_000)) == [(30_000_500, "vgic-affinity-mismatch")]
    other = [ev(100, "affinity", obj=40, tgt=0), ev(500, "sched.run", cpu=2, vcpu=1)]
    assert found(opened(other, end=50_000_000)) == []


def test_an_arrival_while_it_migrates_counts_even_if_it_was_loaded_since() -> None:
    story = [LOADED, *ENDED, WRITE, ev(2_500, "inject", vcpu=1, obj=40)]
    new = ev(2_800, "lr_write", vcpu=1, cpu=1, obj=40, tgt=0, val=HW40)
    for more, counted in ((story, (0, 1)), ([*story, new], (0, 1)), (story[:-1], (1, 0))):
        m = opened([*more, CLEAR], policy="merged").metrics
        assert (m["migrations_quiet"], m["migrations_reraised"]) == counted


def test_a_write_is_unknown_where_migrating_is() -> None:
    """Acknowledged from a list register that nobody saw: whether the first write has begun a migration is not known,
    and so whether another one is refused."""
    queued = [LOADED, *ENDED, ev(1_700, "inject", vcpu=0, obj=40), {**CLEAR, "t": 1_800}]
    taken = [*queued, ev(1_900, "ack", vcpu=0, obj=40), ev(2_000, "itargets", vcpu=0, obj=40, tgt=1)]
    seen = ev(2_500, "lr_write", vcpu=0, cpu=0, obj=40, tgt=0, val=lr_word(40, ACTIVE, 0xA0, physical=40))
    more = [ev(3_000, "itargets", vcpu=0, obj=40, tgt=2), ev(4_000, "itargets", vcpu=0, obj=40, tgt=3)]
    assert found(opened([*taken, seen, *more], policy="merged-2017")) == []
    fresh = {**seen, "val": HW40}  # pending: a new load, so it was not migrating
    assert found(opened([*taken, fresh, *more], policy="merged-2017")) == [(4_000, "vgic-migration-refused")]


def test_a_list_register_in_the_table_of_moves() -> None:
    def state(*events: dict[str, Any]) -> object:
        return opened([*events, WRITE]).extra["vgic_moves"][0]["list_register"]

    both = {**LOADED, "val": lr_word(40, BOTH, 0xA0)}
    assert [state(), state(LOADED), state(LOADED, ENDED[0]), state(both), state(LOADED, *ENDED)] == [
        "none", "pending", "active", "pending and active", "empty, not noticed yet",
    ]  # fmt: skip


def test_stuck_unless_the_old_vcpu_is_paused() -> None:
    for vcpu in (0, 1):
        begun = [{**LOADED, "vcpu": vcpu, "cpu": vcpu}, ev(2_000, "itargets", vcpu=0, obj=40, tgt=2)]
        if vcpu:
            begun.insert(0, ev(0, "itargets", vcpu=0, obj=40, tgt=1))
        paused = [*begun, ev(3_000, "sched.stop", cpu=vcpu, vcpu=vcpu)]
        assert found(opened(begun, policy="merged", end=20_000_000)) == [(10_002_000, "vgic-migrating-stuck")]
        assert found(opened(paused, policy="merged", end=20_000_000)) == []


def test_the_first_event_is_evidence_too() -> None:
    events = [{**WRITE, "t": 0}, LOADED, ev(1_500, "ack", vcpu=0, obj=40)]
    (f,) = opened(events).findings
    assert (f.code.name, f.cause, [e.seq for e in f.evidence]) == ("vgic-delivered-old-target", "", [0, 1, 2])


def test_the_cause_is_named_only_if_there_was_one() -> None:
    events = [ev(0, "sched.stop", cpu=0, vcpu=0), ev(10, "phys_irq", obj=40)]
    (f,) = replay(events, end=2_000_000_000).findings
    assert (f.code.name, f.cause) == ("vgic-lost-irq", "")


def test_moves_are_told_for_ten_thousand_writes() -> None:
    events = [ev(n, "itargets", vcpu=0, obj=40, tgt=n % 2) for n in range(10_005)]
    assert len(opened(events).extra["vgic_moves"]) == 10_000
