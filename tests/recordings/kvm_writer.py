"""ftrace text of a KVM host, line for line as the kernel prints it (arch/x86/kvm/trace.h, include/trace/events/kvm.h).

No recording of a KVM host whose guest takes interrupts through an in-kernel irqchip is at hand; the layouts are those
of the events' recorded format files. One guest: vCPU n is thread 100 + n, its devices are thread 90.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["Host"]

DEVICES = 90
HEADER = """\
# tracer: nop
#
# entries-in-buffer/entries-written: 1/1   #P:4
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""
ZEROS = "info1 0x0000000000000000 info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000"


class Host:
    """Lines of a host; each call takes two microseconds."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.now_us = 78_000_000

    def line(self, pid: int, text: str) -> None:
        """One record of a thread, on the CPU of its number."""
        self.now_us += 2
        name = "qemu-system-x86" if pid == DEVICES else f"CPU {pid - 100}/KVM"
        time = f"{self.now_us // 1_000_000:5d}.{self.now_us % 1_000_000:06d}"
        self.lines.append(f"{name:>16}-{pid:<7d} [{pid % 10:03d}] ..... {time}: {text}\n")

    def wait(self, us: int) -> None:
        """Nothing happens."""
        self.now_us += us

    def enter(self, vcpu: int) -> None:
        """VM entry."""
        self.line(100 + vcpu, f"kvm_entry: vcpu {vcpu}, rip 0xffffffff81000000")

    def leave(self, vcpu: int, reason: str = "MSR_WRITE") -> None:
        """VM exit."""
        self.line(100 + vcpu, f"kvm_exit: vcpu {vcpu} reason {reason} rip 0xffffffff81000000 {ZEROS}")

    def accept(self, vcpu: int, vector: int, mode: str = "Fixed", trigger: str = "level", pid: int = DEVICES) -> None:
        """A message reaches a local APIC."""
        self.line(pid, f"kvm_apic_accept_irq: apicid {vcpu:x} vec {vector} ({mode}|{trigger})")

    def inject(self, vcpu: int, vector: int) -> None:
        """A vector is delivered at the next entry."""
        self.line(100 + vcpu, f"kvm_inj_virq: IRQ {vector:#x}")

    def line_moves(
        self, pin: int, level: int, vector: int, *, source: int = 0, pid: int = DEVICES, send_to: int | None = None,
        extra: str = "",
    ) -> None:  # fmt: skip
        """kvm_set_irq and what follows it in the thread."""
        self.line(pid, f"kvm_set_irq: gsi {pin} level {level} source {source}")
        if pin < 16:
            self.line(pid, f"kvm_pic_set_irq: chip {pin // 8} pin {pin % 8} (level|masked)")
        if send_to is not None:
            self.accept(send_to, vector, pid=pid)
        self.line(pid, f"kvm_ioapic_set_irq: pin {pin} dst 0 vec {vector} (Fixed|physical|level{extra})")

    def eoi(self, vcpu: int, vector: int) -> None:
        """The guest writes EOI."""
        self.line(100 + vcpu, f"kvm_eoi: apicid {vcpu:x} vector {vector}")

    def ack(self, vcpu: int, pin: int) -> None:
        """The EOI reaches a pin."""
        self.line(100 + vcpu, f"kvm_ack_irq: irqchip IOAPIC pin {pin}")

    def level_interrupt(self, vcpu: int, pin: int, vector: int, *, resample: bool = False) -> None:
        """A healthy one: the driver lowers the line in its handler, or the EOI's notifier does (resample)."""
        self.enter(vcpu)
        self.line_moves(pin, 1, vector, send_to=vcpu)
        self.leave(vcpu, "EXTERNAL_INTERRUPT")
        self.inject(vcpu, vector)
        self.enter(vcpu)
        self.wait(5)
        if not resample:
            self.leave(vcpu, "EPT_MISCONFIG")
            self.line_moves(pin, 0, vector)
            self.enter(vcpu)
        self.leave(vcpu)
        self.eoi(vcpu, vector)
        self.ack(vcpu, pin)
        if resample:
            self.line_moves(pin, 0, vector, pid=100 + vcpu)
        self.enter(vcpu)
        self.wait(20)
        self.leave(vcpu, "HLT")

    def message(self, vcpu: int, vector: int) -> None:
        """A healthy MSI, dismissed by a paravirtual EOI."""
        self.line(DEVICES, f"kvm_msi_set_irq: dst {vcpu:x} vec {vector} (Fixed|physical|edge)")
        self.accept(vcpu, vector, trigger="edge")
        self.inject(vcpu, vector)
        self.enter(vcpu)
        self.wait(5)
        self.leave(vcpu, "HLT")
        self.line(100 + vcpu, f"kvm_pv_eoi: apicid {vcpu:x} vector {vector}")

    def boot(self, vcpu: int) -> None:
        """INIT and SIPI from vCPU 0, an NMI: no interrupts."""
        for mode, vector in (("INIT", 0), ("SIPI", 0x9A), ("NMI", 2)):
            self.accept(vcpu, vector, mode, "edge", pid=100)

    def write(self, folder: Path) -> Path:
        """The file."""
        path = folder / "kvm.txt"
        path.write_text(HEADER + "".join(self.lines), encoding="ascii")
        return path
