"""How to record what a system's rules need: exact commands, as data.

Probe lines are those of `probes.tsv`, each with the kernels on which it was tried and how often it fired there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from replay.declare import UsageError
from replay.systems import SYSTEMS

__all__ = ["ELSEWHERE", "PLATFORMS", "RECIPES", "Recipe", "probes", "recipe_document", "recipe_text"]

PLATFORMS: Final = ("xen", "linux", "kvm", "qemu")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to see a system: shell commands, names of probes to set before, and what stays invisible. `groups`: the
    groups of docs/instrumented-xen.md that a debug build of Xen can record for it."""

    system: str
    platform: str
    what: str
    commands: tuple[str, ...]
    probes: tuple[str, ...] = ()
    limits: str = ""
    groups: tuple[str, ...] = ()


#: Everything that stock and instrumented Xen record: scheduler, hardware, HVM, and class 0x100.
_ALL: Final = "xentrace -D -e 0x018af000 -S 8192 host.xentrace"
_INSTRUMENTED: Final = "a Xen built with the trace points of docs/instrumented-xen.md, groups"

#: Why a system cannot be recorded on a platform.
ELSEWHERE: Final[dict[tuple[str, str], str]] = {
    ("hpet", "kvm"): "the host's kernel wakes its own CPUs: record the host with --on linux",
    ("callback", "kvm"): "KVM traces nothing of its emulation of Xen's callback but kvm_xen_hypercall, without a port",
    ("callback", "qemu"): "the emulator has no trace point at the callback",
    ("vgic", "linux"): "the virtual GIC is the hypervisor's: record the host with --on kvm",
    ("irqflow", "xen"): "flow handlers run in the guest's kernel: record the guest with --on linux",
    ("irqflow", "kvm"): "flow handlers run in the guest's kernel: record guest or host with --on linux",
    ("irqflow", "qemu"): "flow handlers are software of the guest: record the guest with --on linux",
    ("evtchn", "kvm"): "KVM traces nothing of its emulation of event channels but kvm_xen_hypercall, without a port",
    ("evtchn", "qemu"): "event channels are words in memory, which the emulator does not log",
    ("gic", "xen"): "Xen on Arm writes no interrupt records",
    ("gic", "linux"): "no trace point shows GIC registers, and guessed probes would be of one driver and kernel",
    ("gic", "kvm"): "a guest's acknowledge and EOI do not trap on GICv2",
}

_KPROBES: Final = (
    "cd /sys/kernel/tracing",
    "cat > kprobe_events   # the probe lines below, then Ctrl-D",
)
_QEMU: Final = "qemu-system-… -msg timestamp=on -D device.log -trace events=events.txt"

RECIPES: Final[tuple[Recipe, ...]] = (
    Recipe(
        "hpet", "xen", "sleeps, deadlines, wakes, handlers and where each channel is pointed",
        ("xentrace -D -e 0x0082f000 -S 8192 host.xentrace", "xl debug-keys i; xl dmesg > keys.txt"),
        limits="Stock Xen records neither owners nor comparators: hpet-wrong-cpu and hpet-spurious-irq are inferred.",
        groups=("hpet", "idle", "irq", "mwait"),
    ),
    Recipe(
        "hpet", "linux", "per-CPU HPET channels: handlers, idle, timers",
        (*_KPROBES, "trace-cmd record -C x86-tsc -e power:cpu_idle -e irq:irq_handler_entry -e irq:irq_handler_exit "
         "-e timer:hrtimer_start -e timer:hrtimer_expire_entry -e timer:tick_stop -e tmr -e hpet "
         "-o linux.dat sleep 10",
         "cat /proc/interrupts > interrupts.txt; cat /proc/timer_list > timer_list.txt"),
        probes=("clockevents_program", "next", "msi_irq"),
        limits="Without the probes a channel's owner is inferred: who takes most of its interrupts. No kernel at hand "
        "used HPET channels and let itself be probed there: the last two fired nowhere, and the name that the first "
        "fetches was (fault); its deadlines are exactly those of the timers. Linux shares no channel: rules about "
        "members stay blind.",
    ),
    Recipe(
        "hpet", "qemu", "comparator writes, MSI routes and interrupts as the emulated hardware saw them",
        ("printf 'memory_region_ops_write\\napic_*\\n' > events.txt", _QEMU),
    ),
    Recipe(
        "callback", "xen", "injections, EOIs and VM entries of HVM guests, and who runs where",
        ("xentrace -D -e 0x008af000 -S 8192 host.xentrace",
         "for i in 1 2; do xl debug-keys Ieq; sleep 1; done; xl dmesg > keys.txt"),
        limits="The upcall flag and the line itself are not recorded by stock Xen: record the guest too (--on linux).",
        groups=("callback", "vlapic"),
    ),
    Recipe(
        "callback", "linux", "in the guest: the platform interrupt's handler and the upcall",
        (*_KPROBES, "trace-cmd record -C x86-tsc -e irq:irq_handler_entry -e irq:irq_handler_exit -e xenev "
         "-o guest.dat sleep 10"),
        probes=("upcall", "evtchn_2l_handle_events", "evtchn_2l_unmask"),
    ),
    Recipe(
        "vgic", "xen", "nothing on a stock build: Xen on Arm writes no interrupt records", (_ALL,),
        groups=("vgic", "guest"),
    ),
    Recipe(
        "vgic", "qemu", "list registers, ITARGETSR, acknowledges and EOIs, physical and virtual",
        ("printf 'gic_*\\n' > events.txt", _QEMU),
        limits="Xen on Arm writes no interrupt records at all; the emulator's log is the only stock source.",
    ),
    Recipe(
        "vgic", "kvm", "what is made pending for a guest on arm64",
        ("trace-cmd record -e kvm:vgic_update_irq_pending -e kvm:kvm_irq_line -e kvm:kvm_entry -e kvm:kvm_exit "
         "-o arm.dat sleep 10",),
        limits="List registers are not traced by KVM.",
    ),
    Recipe(
        "irqflow", "linux", "handlers, affinity changes and flow handlers of every interrupt",
        (*_KPROBES, "trace-cmd record -C x86-tsc -e irq:irq_handler_entry -e irq:irq_handler_exit -e irq_vectors "
         "-e irqflow -e xenev -o linux.dat sleep 10"),
        probes=("edge", "level", "fasteoi", "percpu", "hie", "setaff", "move", "lateeoi", "set_aff"),
        limits="Offsets into struct irq_desc are those of the kernels named; elsewhere (arm64, another configuration) "
        "the same lines are accepted and read garbage: compare irq= with the irq_handler_entry that follows. Raises "
        "and the last look of a driver at its ring need the sender's recording and a driver probe.",
    ),
    Recipe(
        "evtchn", "linux", "upcalls, masks, unmasks, bindings and handlers of event channels (Xen guests and dom0)",
        (*_KPROBES, "trace-cmd record -C x86-tsc -e irq:irq_handler_entry -e irq:irq_handler_exit -e xenev "
         "-o guest.dat sleep 10", "lsevtchn 0 > lsevtchn.txt"),
        probes=("pv_upcall_in", "upcall", "handle_port", "evtchn_2l_handle_events", "evtchn_2l_mask",
                "evtchn_2l_unmask", "evtchn_2l_clear_pending", "evtchn_2l_bind_to_cpu",
                "fifo_handle", "fifo_handle2", "fifo_mask", "fifo_unmask", "fifo_clear", "set_aff", "lateeoi",
                "notify"),
        limits="The hypervisor's sends are not seen: without samples of the pending and selector words at each probe, "
        "the rules about stranded ports and selectors stay blind. Two-level lines were tried as kprobes/ of the same "
        "functions and first arguments.",
    ),
    Recipe(
        "evtchn", "xen", "port states at one moment, as evidence at the end",
        ("for i in 1 2; do xl debug-keys eq; sleep 1; done; xl dmesg > keys.txt", "lsevtchn DOMAIN > lsevtchn.txt"),
        limits="Stock Xen has no event-channel trace point. What one dump shows is assumed to last (confidence 50); "
        "the second proves it. On the toolstack's side lsevtchn is kept as a table and read by no rule.",
        groups=("evtchn", "guest"),
    ),
    Recipe(
        "apic", "xen", "injections and EOIs of HVM and PVH guests, and who runs where",
        ("xentrace -D -e 0x000af000 -S 8192 host.xentrace",
         "for i in 1 2; do xl debug-keys iz; sleep 1; done; xl dmesg > keys.txt"),
        limits="With VMX virtual interrupt delivery most injections and EOIs leave no record. The keys show "
        "redirection entries and Remote IRR of the physical IOAPIC; the physical local APICs no key shows.",
        groups=("vlapic", "callback", "irq"),
    ),
    Recipe(
        "apic", "kvm", "requests, injections and EOIs of guests' LAPICs, IOAPIC pins",
        ("trace-cmd record -e kvm:kvm_apic_accept_irq -e kvm:kvm_inj_virq -e kvm:kvm_eoi -e kvm:kvm_pv_eoi "
         "-e kvm:kvm_apicv_accept_irq -e kvm:kvm_apic -e kvm:kvm_set_irq -e kvm:kvm_ioapic_set_irq -e kvm:kvm_ack_irq "
         "-e kvm:kvm_ioapic_delayed_eoi_inj -e kvm:kvm_msi_set_irq -e kvm:kvm_entry -e kvm:kvm_exit "
         "-o kvm.dat sleep 10",),
        limits="One guest at a time: the records name vCPUs, not guests. With APICv or AVIC injections and most EOIs "
        "are not traced (kvm_apicv_accept_irq tells); to see them load kvm_intel with enable_apicv=0 or kvm_amd with "
        "avic=0. With a split irqchip the IOAPIC is in user space and leaves no record. When the guest's handlers "
        "return is in the guest's own recording only.",
    ),
    Recipe(
        "apic", "linux", "vectors taken by each CPU",
        ("trace-cmd record -C x86-tsc -e irq_vectors -e irq:irq_handler_entry -e irq:irq_handler_exit "
         "-o linux.dat sleep 10",),
    ),
    Recipe(
        "apic", "qemu", "lines, redirection entries, remote IRR, messages, EOIs, HPET registers",
        ("printf 'ioapic_*\\napic_*\\nmemory_region_ops_write\\nx86_gsi_interrupt\\n' > events.txt", _QEMU),
    ),
    Recipe(
        "gic", "qemu", "distributor, CPU interfaces and virtual interfaces",
        ("printf 'gic_*\\n' > events.txt", _QEMU),
    ),
)  # fmt: skip


def probes() -> dict[str, tuple[str, str]]:
    """Probe name to (definition, where it was tried)."""
    lines = (Path(__file__).parent / "probes.tsv").read_text(encoding="utf-8").splitlines()[1:]
    found: dict[str, tuple[str, str]] = {}
    for line in lines:
        definition, _, tried = line.partition("\t")
        name = definition.split()[0].partition("/")[2]
        found.setdefault(name, (definition, tried))
    return found


def _chosen(system: str, platform: str | None) -> list[Recipe]:
    if system not in SYSTEMS:
        raise UsageError(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
    if platform is not None and platform not in PLATFORMS:
        raise UsageError(f"--on wants one of {', '.join(PLATFORMS)}, not {platform!r}")
    found = [r for r in RECIPES if r.system == system and platform in (None, r.platform)]
    if not found:
        there = ", ".join(r.platform for r in RECIPES if r.system == system)
        why = ELSEWHERE[system, str(platform)]
        raise UsageError(f"{system} cannot be recorded on {platform} ({why}); it can on {there}")
    return found


def recipe_document(system: str, platform: str | None) -> dict[str, Any]:
    """`recipe --json`."""
    known = probes()
    return {
        "schema": 1,
        "system": system,
        "recipes": [
            {
                "on": r.platform,
                "what": r.what,
                "commands": list(r.commands),
                "probes": [{"definition": known[p][0], "tried": known[p][1]} for p in r.probes],
                "limits": r.limits,
                "instrumented": {"groups": list(r.groups), "command": _ALL} if r.groups else None,
            }
            for r in _chosen(system, platform)
        ],
    }


def recipe_text(system: str, platform: str | None) -> str:
    """Commands that can be pasted into a shell; everything else is a comment."""
    known = probes()
    lines = [f"# To check {system} ({SYSTEMS[system].title if system in SYSTEMS else ''})"]
    for r in _chosen(system, platform):
        lines += ["", f"# on {r.platform}: {r.what}", *(c for c in r.commands if c != _ALL)]
        if r.probes:
            lines.append("# probe lines, with the kernels on which they were tried and their hits there")
            lines += [f"{known[p][0]}   # {known[p][1]}" for p in r.probes]
        if r.limits:
            lines.append(f"# limits: {r.limits}")
        if r.groups:
            lines.append(f"# {_INSTRUMENTED} {', '.join(r.groups)}:")
            lines.append(_ALL)
    return "\n".join(lines)
