"""What Xen prints for debug keys (`xl debug-keys`, or the serial console), declared as data.

A `Rule` is one kind of line: the table it goes to, its pattern, the dump it must stand in (`within`), the dump it opens
(`enter`), which of its values hold for the lines below (`sets`) and which it takes from above (`uses`).
Rules marked `tried=False` are written from Xen's printk formats and have not met a real dump.
Sources of the formats: Xen 4.2–4.20, `domain_dump_evtchn_info`, `dump_irqs`, `dump_ioapic_irq_info`, `__print_IO_APIC`,
`dump_msi`, `dump_domains`, `gic_dump_info` (Arm), `irq_dump` (HVM), `dump_timerq`, `dump_cx`, `dump_runq`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["EVTCHN_STATES", "RULES", "Rule"]

EVTCHN_STATES = ("free", "reserved", "unbound", "interdomain", "pirq", "virq", "ipi")


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of line; see the module."""

    table: str
    pattern: re.Pattern[str]
    within: str | None = None
    enter: str | None = None
    sets: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    tried: bool = True


def _rule(
    table: str, pattern: str, *, within: str = "", enter: str = "", sets: str = "", uses: str = "", tried: bool = True
) -> Rule:
    compiled = re.compile("^" + pattern + r"\s*$")
    return Rule(table, compiled, within or None, enter or None, tuple(sets.split()), tuple(uses.split()), tried)


def _heading(kind: str, pattern: str, *, sets: str = "", tried: bool = True) -> Rule:
    return _rule("xen_dump", f"(?P<text>{pattern})", enter=kind, sets=sets, tried=tried)


RULES: tuple[Rule, ...] = (
    _heading("evtchn", r"'e' pressed -> dumping event-channel info"),
    _heading("evtchn", r"Event channel information for domain (?P<dom>\d+):", sets="dom"),
    _heading("irq", r"IRQ information:|Guest interrupt information:"),
    _heading("direct_vector", r"Direct vector information:"),
    _heading("ioapic_irq", r"IO-APIC interrupt information:"),
    _heading("ioapic", r"'z' pressed -> dumping? .*|number of MP IRQ sources: \d+\."),
    _heading("msi", r"MSI information:|PCI-MSI interrupt information:"),
    _heading("domain", r"'q' pressed -> dumping domain info .*", tried=False),
    _heading("domain", r"General information for domain (?P<dom>\d+):", sets="dom", tried=False),
    _heading("domain", r"VCPU information and callbacks for domain (?P<dom>\d+):", sets="dom", tried=False),
    _heading("hvm_irq", r"'I' pressed -> dumping HVM irq info", tried=False),
    _heading("timer", r"Dumping timer queues:"),
    _heading("cstate", r"'c' pressed -> printing ACPI Cx structures"),
    _heading("sched", r"sched_smt_power_savings: \w+"),
    _heading("pressed", r"'(?P<key>.)' pressed -> .*"),
    _rule(
        "evtchn",
        r"\s*(?P<port>\d+) \[(?P<pending>[01])/(?P<masked>[01])(?:/(?P<queue>[^\]]*))?\]: s=(?P<s>\d+)"
        r" n=(?P<vcpu>\d+)"
        r"(?:/\d+)?(?P<rest>(?: \w=\S+)*)",
        within="evtchn",
        uses="dom",
    ),
    _rule("evtchn_polling", r"Polling vCPUs: \{(?P<vcpus>[^}]*)\}", within="evtchn", uses="dom"),
    _rule(
        "irq",
        r"\s*IRQ:\s*(?P<irq>\d+) vec:(?P<vector>[0-9a-f]{2}) (?P<type>\S+)\s+status=(?P<status>[0-9a-f]+) "
        r"aff:\{(?P<affinity>[^}]*)\}/\{(?P<effective>[^}]*)\}(?: in-flight=(?P<in_flight>\d+))?(?:"
        r" (?P<handler>.*))?",
    ),
    _rule(
        "irq",
        r"\s*IRQ:\s*(?P<irq>\d+) affinity:(?P<affinity>\S+) vec:(?P<vector>[0-9a-f]{2}) type=(?P<type>\S+)\s+"
        r"status=(?P<status>[0-9a-f]+)(?: in-flight=(?P<in_flight>\d+))?(?: (?:domain-list=)?(?P<handler>.*))?",
        tried=False,
    ),
    _rule("direct_vector", r"\s*0x(?P<vector>[0-9a-f]{2}) -> (?P<handler>\S.*?)", within="direct_vector"),
    _rule("xen_dump", r"\s+(?P<text>IRQ\s*(?P<irq>\d+) Vec\s*\d+:)", within="ioapic_irq", sets="irq"),
    _rule(
        "ioapic_irq",
        r"\s+Apic 0x(?P<apic>[0-9a-f]+), Pin\s*(?P<pin>\d+): vec=(?P<vector>[0-9a-f]+) delivery=(?P<delivery>\S+)\s+"
        r"dest=(?P<dest_mode>\w) status=(?P<send_pending>\d) polarity=(?P<active_low>\d)"
        r" irr=(?P<remote_irr>\d) trig=(?P<trigger>\w) "
        r"mask=(?P<masked>\d) dest_id:(?P<dest>[0-9a-f]+)",
        within="ioapic_irq",
        uses="irq",
    ),
    _rule("xen_dump", r"(?P<text>IO APIC #(?P<ioapic>\d+)\.+)", sets="ioapic", enter="ioapic"),
    _rule(
        "ioapic_register",
        r"\.+ register #(?P<reg>[0-9a-fA-F]+): (?P<value>[0-9a-fA-F]{8})",
        within="ioapic",
        uses="ioapic",
    ),
    _rule(
        "ioapic_rte",
        r" (?P<pin>[0-9a-f]{2,3})  (?P<dest>[0-9A-Fa-f]{2,8})  (?P<masked>[01])   (?P<level>[01])  "
        r" (?P<remote_irr>[01])   (?P<active_low>[01])"
        r"   (?P<send_pending>[01])    (?P<dest_mode>[01])    (?P<delivery_mode>\d)    (?P<vector>[0-9A-F]{2})",
        within="ioapic",
        uses="ioapic",
    ),
    _rule("irq_pin", r"IRQ(?P<index>\d+) (?P<pins>(?:-> ?\d+:\d+ ?)+)", within="ioapic"),
    _rule(
        "msi",
        r"\s*(?P<type>[A-Z][A-Za-z-]*)\s+(?P<irq>\d+)"
        r" vec=(?P<vector>[0-9a-f]{2})\s+(?P<delivery>fixed|lowest)\s+(?P<trigger>edge|level)\s+"
        r"(?P<asserted>(?:de)?assert)\s+(?P<dest_mode>phys|log)\s+(?P<target>cpu|lowest) dest=(?P<dest>[0-9a-f]+) "
        r"mask=(?P<mask_cap>\d)/(?P<host_masked>.)(?P<guest_masked>.)/(?P<mask_bit>.)",
    ),
    _rule(
        "domain",
        r"\s*refcnt=(?P<refcnt>-?\d+) dying=(?P<dying>\d+) pause_count=(?P<pause_count>-?\d+)",
        within="domain",
        uses="dom",
        tried=False,
    ),
    _rule(
        "vcpu",
        r"\s*VCPU(?P<vcpu>\d+): CPU(?P<cpu>\d+) \[has=(?P<running>[TF])\] (?:flags=\w+ )?poll=(?P<poll>-?\d+)"
        r" upcall_pend\s*=\s*(?P<upcall_pending>[0-9a-f]+),? "
        r"upcall_mask\s*=\s*(?P<upcall_mask>[0-9a-f]+)(?: dirty_cpus?=(?P<dirty_cpu>\S+))?.*?",
        within="domain",
        uses="dom",
        sets="vcpu",
        tried=False,
    ),
    _rule(
        "vcpu_pause",
        r"\s*pause_count=(?P<pause_count>-?\d+) pause_flags=(?P<pause_flags>[0-9a-f]+)",
        within="domain",
        uses="dom vcpu",
        tried=False,
    ),
    _rule(
        "gich_mask",
        r"GICH_LRs \(vcpu (?P<vcpu>\d+)\) mask=(?P<mask>[0-9a-f]+)",
        within="domain",
        uses="dom",
        sets="vcpu",
        tried=False,
    ),
    _rule(
        "gich_lr",
        r"\s*(?P<place>HW|VCPU)_LR\[(?P<lr>\d+)\]=(?P<value>[0-9a-f]+)",
        within="domain",
        uses="dom vcpu",
        tried=False,
    ),
    _rule(
        "vgic_irq",
        r"(?P<list>Inflight|Pending) irq=(?P<irq>\d+)(?: lr=(?P<lr>\d+))?",
        within="domain",
        uses="dom vcpu",
        tried=False,
    ),
    _rule(
        "unit_affinity",
        r"\s*UNIT(?P<unit>\d+) affinities: hard=\{(?P<hard>[^}]*)\} soft=\{(?P<soft>[^}]*)\}",
        within="domain",
        uses="dom",
        tried=False,
    ),
    _rule(
        "virq_notified",
        r"\s*Notifying guest (?:d?(?P<dom>\d+)[:v](?P<vcpu>\d+)) \(virq (?P<virq>\d+), port (?P<port>\d+)(?:,"
        r" stat (?P<stat>\S+))?\)",
        tried=False,
    ),
    _rule("xen_dump", r"(?P<text>Domain (?P<dom>\d+):)", within="hvm_irq", sets="dom", tried=False),
    _rule(
        "hvm_irq",
        r"PCI 0x(?P<pci_intx>[0-9a-f]{16})(?P<pci_intx_low>[0-9a-f]{16}) ISA 0x(?P<isa>[0-9a-f]+) ROUTE"
        r" (?P<route>\d+ \d+ \d+ \d+)",
        within="hvm_irq",
        uses="dom",
        tried=False,
    ),
    _rule(
        "hvm_gsi",
        r"GSI \[(?P<first>[0-9a-f]+) - (?P<last>[0-9a-f]+)\] (?P<counts>[\d ]+?)",
        within="hvm_irq",
        uses="dom",
        tried=False,
    ),
    _rule("hvm_link", r"Link (?P<counts>\d+ \d+ \d+ \d+)", within="hvm_irq", uses="dom", tried=False),
    _rule(
        "hvm_callback",
        r"Callback via (?P<via>\d+):(?P<number>\w+),(?: ?(?P<asserted>not))? asserted",
        within="hvm_irq",
        uses="dom",
        tried=False,
    ),
    _rule(
        "hvm_callback",
        r"Callback via (?P<via>none|GSI|PCI dev|vector)(?: (?P<number>\S+(?: INTx \S+)?))?(?:"
        r" (?P<asserted>\(asserted\)))?",
        within="hvm_irq",
        uses="dom",
        tried=False,
    ),
    _rule("xen_dump", r"(?P<text>CPU(?P<cpu>\d+):)", within="timer", sets="cpu"),
    _rule(
        "timer",
        r"\s*ex=\s*(?P<expires_us>-?\d+)us timer=(?P<timer>[0-9a-f]+)"
        r" cb=(?P<callback>[^\s(]+)\((?P<data>[0-9a-f]+)\).*?",
        within="timer",
        uses="cpu",
    ),
    _rule("xen_dump", r"(?P<text>==cpu(?P<cpu>\d+)==)", within="cstate", sets="cpu"),
    _rule("cstate_limit", r"max (?:state|cstate): (?P<limit>\S.*?)", within="cstate"),
    _rule(
        "cstate",
        r"\s*(?P<current>\*)?C(?P<index>\d+):\s+type\[\s*(?P<type>\w+)\] latency\[\s*(?P<latency>\d+)\]"
        r" usage\[\s*(?P<usage>\d+)\] "
        r"method\[\s*(?P<method>[^\]]*?)\] duration\[\s*(?P<duration>\d+)\]",
        within="cstate",
        uses="cpu",
    ),
    _rule(
        "cstate",
        r"\s*(?P<current>\*)?C(?P<index>0):\s+usage\[\s*(?P<usage>\d+)\] duration\[\s*(?P<duration>\d+)\]",
        within="cstate",
        uses="cpu",
    ),
    _rule("cstate_residency", r"\s*(?P<counters>(?:[PC]C\d+\[\d+\] ?)+)", within="cstate", uses="cpu"),
    _rule("xen_now", r"NOW=(?P<now_ns>\d+)"),
    _rule("cpu_current", r"CPU\[(?P<cpu>\d+)\] current=(?P<current>\S+), curr=(?P<curr>\S+), prev=(?P<prev>\S+)"),
    _rule(
        "sched_unit",
        r"\s+(?P<running>run|\d+): \[(?P<dom>\d+)\.(?P<vcpu>\d+)\] flags=(?P<flags>[0-9a-f]+)"
        r" cpu=(?P<cpu>\d+) credit=(?P<credit>-?\d+).*?",
    ),
)
