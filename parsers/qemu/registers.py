"""Device-register accesses of a QEMU log, decoded from the raw events into one table per device.

A decoded row carries the `seq` of the raw line it comes from: it is a second view of the same record.
Register maps: HPET 1.0a (2.3), Intel SDM vol. 3 (LAPIC, MSI), 82093AA IOAPIC, Arm IHI 0048B GICv2 (4.3, 4.4, 5.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from parsers.qemu.regtables import (
    GICC_IRQ,
    GICC_REGS,
    GICD_REGS,
    GICH_REGS,
    HPET_REGS,
    IOAPIC_REGS,
    LAPIC_REGS,
)
from parsers.tables import COMMON, Table

__all__ = ["DECODERS", "decode"]

Array = npt.NDArray[np.generic]
U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
#: A decoded column: values, and where they hold (None: everywhere). Strings come as codes into a list of names.
Cell = tuple[Array, Mask | None] | tuple[Array, Mask | None, Sequence[str]]
#: Raw columns by name → (rows of the raw table that are such accesses, decoded columns).
Decoder = Callable[[Mapping[str, Array]], tuple[Mask, dict[str, Cell]]]


def _bits(value: U64, low: int, count: int = 1) -> Array:
    return ((value >> np.uint64(low)) & np.uint64((1 << count) - 1)).astype(np.uint16)


def _bit(value: U64, low: int) -> Array:
    return _bits(value, low).astype(np.bool_)


def _named(offset: U64, names: Mapping[int, str]) -> tuple[npt.NDArray[np.int16], list[str]]:
    """Codes and names of the registers at these offsets; OTHER when not in `names`."""
    known = np.array(sorted(names), np.uint64)
    labels = [*(names[int(k)] for k in known), "OTHER"]
    at = np.minimum(np.searchsorted(known, offset), len(known) - 1)
    return np.where(known[at] == offset, at, len(known)).astype(np.int16), labels


def _code(codes: Array, names: Sequence[str], *wanted: str) -> Mask:
    """Rows whose register is one of `wanted` (a trailing "*" matches any rest)."""
    hit = [
        i
        for i, name in enumerate(names)
        if any(name == w or (w.endswith("*") and name.startswith(w[:-1])) for w in wanted)
    ]
    return np.isin(codes, hit)


def _hpet(row: Mapping[str, Array], write: bool) -> tuple[Mask, dict[str, Cell]]:
    mine = np.asarray(row["name"] == "hpet")
    off, value = row["addr"].astype(np.uint64)[mine] & np.uint64(0x3FF), row["value"].astype(np.uint64)[mine]
    timer_off = off & np.uint64(0x1F)
    is_timer = off >= np.uint64(0x100)
    general = {0x00: 0, 0x10: 1, 0x20: 2, 0xF0: 3}
    codes = np.full(len(off), HPET_REGS.index("OTHER"), np.int16)
    for at, code in general.items():
        codes[~is_timer & ((off & np.uint64(0x3F8)) == at)] = code
    fsb_addr = (timer_off & np.uint64(0x1C)) == 0x14
    for at, name in ((0x00, "TN_CONFIG"), (0x08, "TN_CMP"), (0x10, "TN_FSB_VALUE")):
        codes[is_timer & ((timer_off & np.uint64(0x18)) == at)] = HPET_REGS.index(name)
    codes[is_timer & fsb_addr] = HPET_REGS.index("TN_FSB_ADDR")
    fsb = _code(codes, HPET_REGS, "TN_FSB_*")
    high = ((off & np.uint64(4)) != 0) & ~fsb
    general_cfg, config = (codes == 1) & ~high, (codes == HPET_REGS.index("TN_CONFIG")) & ~high
    data, addr = codes == HPET_REGS.index("TN_FSB_VALUE"), codes == HPET_REGS.index("TN_FSB_ADDR")
    return mine, {
        "write": (np.full(len(off), write), None),
        "reg": (codes, None, HPET_REGS),
        "timer": (((off - np.uint64(0x100)) >> np.uint64(5)), is_timer),
        "high": (high, None),
        "value": (value, None),
        "size": (row["size"][mine], None),
        "enable": (_bit(value, 0), general_cfg),
        "legacy": (_bit(value, 1), general_cfg),
        "level": (_bit(value, 1), config),
        "int_enable": (_bit(value, 2), config),
        "periodic": (_bit(value, 3), config),
        "route": (_bits(value, 9, 5), config),
        "fsb": (_bit(value, 14), config),
        "vector": (_bits(value, 0, 8), data),
        "dest": (_bits(value, 12, 8), addr),
        "dest_mode": (_bits(value, 2), addr),
    }


def _msi(row: Mapping[str, Array]) -> tuple[Mask, dict[str, Cell]]:
    # The window holds both: a CPU's own LAPIC registers (register index != 0 in the first page, logged as apic_mem_*)
    # and messages. A message to destination 0 in physical mode has address 0xfee00000: register index 0.
    addr, by = row["addr"].astype(np.uint64), row["by"].astype(np.int64)
    off = addr & np.uint64(0xFFFFF)
    mine = np.asarray(row["name"] == "apic-msi") & ((off > 0xFFF) | (off < 0x10) | (by < 0))
    addr, data = addr[mine], row["value"].astype(np.uint64)[mine]
    return mine, {
        "by": (by[mine], None),
        "dest": (_bits(addr, 12, 8), None),
        "dest_mode": (_bits(addr, 2), None),
        "redirect": (_bit(addr, 3), None),
        "vector": (_bits(data, 0, 8), None),
        "delivery_mode": (_bits(data, 8, 3), None),
        "level": (_bits(data, 14), None),
        "trigger_mode": (_bits(data, 15), None),
    }


def _lapic(row: Mapping[str, Array], write: bool) -> tuple[Mask, dict[str, Cell]]:
    off, value = row["reg_offset"].astype(np.uint64) & np.uint64(0xFFF), row["value"].astype(np.uint64)
    codes, names = _named(off, LAPIC_REGS)
    icr, lvt, icr_hi = (
        _code(codes, names, "ICR_LO"),
        _code(codes, names, "LVT_*"),
        _code(codes, names, "ICR_HI"),
    )
    return np.ones(len(off), np.bool_), {
        "write": (np.full(len(off), write), None),
        "reg_offset": (off, None),
        "reg": (codes, None, names),
        "value": (value, None),
        "vector": (_bits(value, 0, 8), icr | lvt),
        "delivery_mode": (_bits(value, 8, 3), icr | lvt),
        "dest_mode": (_bits(value, 11), icr),
        "shorthand": (_bits(value, 18, 2), icr),
        "masked": (_bit(value, 16), lvt),
        "dest": (_bits(value, 24, 8), icr_hi),
    }


def _ioapic(row: Mapping[str, Array], write: bool) -> tuple[Mask, dict[str, Cell]]:
    off, sel, value = (row[n].astype(np.uint64) for n in ("reg_offset", "regsel", "value"))
    codes = np.full(len(off), IOAPIC_REGS.index("OTHER"), np.int16)
    codes[off == 0] = IOAPIC_REGS.index("IOREGSEL")
    window = off == 0x10
    for at, name in ((0, "ID"), (1, "VERSION"), (2, "ARB")):
        codes[window & (sel == at)] = IOAPIC_REGS.index(name)
    rte = window & (sel >= 0x10)
    low = rte & (sel % np.uint64(2) == 0)
    codes[low] = IOAPIC_REGS.index("RTE_LO")
    codes[rte & ~low] = IOAPIC_REGS.index("RTE_HI")
    eoi = off == 0x40
    codes[eoi] = IOAPIC_REGS.index("EOI")
    return np.ones(len(off), np.bool_), {
        "write": (np.full(len(off), write), None),
        "reg": (codes, None, IOAPIC_REGS),
        "pin": ((sel - np.uint64(0x10)) >> np.uint64(1), rte),
        "value": (value, None),
        "vector": (_bits(value, 0, 8), low | eoi),
        "delivery_mode": (_bits(value, 8, 3), low),
        "dest_mode": (_bits(value, 11), low),
        "send_pending": (_bit(value, 12), low),
        "active_low": (_bit(value, 13), low),
        "remote_irr": (_bit(value, 14), low),
        "trigger_mode": (_bits(value, 15), low),
        "masked": (_bit(value, 16), low),
        "dest": (_bits(value, 24, 8), rte & ~low),
    }


def _gicd(row: Mapping[str, Array], write: bool) -> tuple[Mask, dict[str, Cell]]:
    off, value, size = (row[n].astype(np.uint64) for n in ("reg_offset", "value", "size"))
    names = [*(block[2] for block in GICD_REGS), "OTHER"]
    starts, stops = (np.array([block[i] for block in GICD_REGS], np.uint64) for i in (0, 1))
    bits = np.array([*(block[3] for block in GICD_REGS), 0], np.uint64)
    at = np.maximum(np.searchsorted(starts, off, side="right").astype(np.int64) - 1, 0)
    codes = np.where((off >= starts[at]) & (off < stops[at]), at, len(GICD_REGS)).astype(np.int16)
    per_irq = bits[codes]
    indexed = per_irq > 0
    divisor = np.maximum(per_irq, np.uint64(1))
    base = np.append(starts, np.uint64(0))[codes]
    sgir = codes == names.index("SGIR")
    return np.ones(len(off), np.bool_), {
        "write": (np.full(len(off), write), None),
        "reg_offset": (off, None),
        "reg": (codes, None, names),
        "value": (value, None),
        "size": (size, None),
        "irq_first": ((off - base) * np.uint64(8) // divisor, indexed),
        "irq_count": (size * np.uint64(8) // divisor, indexed),
        "sgi": (_bits(value, 0, 4), sgir),
        "sgi_targets": (_bits(value, 16, 8), sgir),
        "sgi_filter": (_bits(value, 24, 2), sgir),
    }


def _gicc(row: Mapping[str, Array], write: bool) -> tuple[Mask, dict[str, Cell]]:
    off, value = row["reg_offset"].astype(np.uint64), row["value"].astype(np.uint64)
    codes, names = _named(off, GICC_REGS)
    irq = _code(codes, names, *GICC_IRQ)
    return np.ones(len(off), np.bool_), {
        "write": (np.full(len(off), write), None),
        "virtual": (np.asarray(row["iface"] == "vcpu"), None),
        "core": (row["core"], None),
        "reg_offset": (off, None),
        "reg": (codes, None, names),
        "value": (value, None),
        "irq": (_bits(value, 0, 10), irq),
        "source_cpu": (_bits(value, 10, 3), irq),
    }


def _gich(row: Mapping[str, Array], write: bool) -> tuple[Mask, dict[str, Cell]]:
    off, value = row["reg_offset"].astype(np.uint64), row["value"].astype(np.uint64)
    codes, names = _named(off, GICH_REGS)
    names = [*names, "LR"]
    lr = (off >= 0x100) & (off < 0x200)
    codes = np.where(lr, len(names) - 1, codes).astype(np.int16)
    hcr = codes == names.index("HCR")
    hw = _bit(value, 31).astype(np.bool_)
    return np.ones(len(off), np.bool_), {
        "write": (np.full(len(off), write), None),
        "reg_offset": (off, None),
        "reg": (codes, None, names),
        "lr": ((off - np.uint64(0x100)) >> np.uint64(2), lr),
        "value": (value, None),
        "enable": (_bit(value, 0), hcr),
        "uie": (_bit(value, 1), hcr),
        "eoi_count": (_bits(value, 27, 5), hcr),
        "virq": (_bits(value, 0, 10), lr),
        "pirq": (_bits(value, 10, 10), lr & hw),
        "eoi_maintenance": (_bit(value, 19), lr & ~hw),
        "source_cpu": (_bits(value, 10, 3), lr & ~hw),
        "priority": (_bits(value, 23, 5), lr),
        "state": (_bits(value, 28, 2), lr),
        "group1": (_bit(value, 30), lr),
        "hw": (hw, lr),
    }


def _rw(function: Callable[[Mapping[str, Array], bool], tuple[Mask, dict[str, Cell]]], write: bool) -> Decoder:
    return lambda row: function(row, write)


#: (raw event, table it is decoded into, how)
DECODERS: tuple[tuple[str, str, Decoder], ...] = (
    ("memory_region_ops_read", "hpet_reg", _rw(_hpet, False)),
    ("memory_region_ops_write", "hpet_reg", _rw(_hpet, True)),
    ("memory_region_ops_write", "msi_write", _msi),
    ("apic_mem_readl", "lapic_reg", _rw(_lapic, False)),
    ("apic_mem_writel", "lapic_reg", _rw(_lapic, True)),
    ("ioapic_mem_read", "ioapic_reg", _rw(_ioapic, False)),
    ("ioapic_mem_write", "ioapic_reg", _rw(_ioapic, True)),
    ("gic_dist_read", "gicd_reg", _rw(_gicd, False)),
    ("gic_dist_write", "gicd_reg", _rw(_gicd, True)),
    ("gic_cpu_read", "gicc_reg", _rw(_gicc, False)),
    ("gic_cpu_write", "gicc_reg", _rw(_gicc, True)),
    ("gic_hyp_read", "gich_reg", _rw(_gich, False)),
    ("gic_hyp_write", "gich_reg", _rw(_gich, True)),
)


def _strings(column: Any) -> Array:
    encoded = column.combine_chunks().dictionary_encode()
    words = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
    out: Array = words[encoded.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]
    return out


def decode(table: Table, decoder: Decoder, raw: pa.Table) -> pa.Table | None:
    """The rows of `raw` (a raw event table) as rows of `table`; None when there are none."""
    row: dict[str, Array] = {}
    for name in raw.column_names[len(COMMON) + 1 :]:  # the event's own arguments, none of them null except `name`
        column = raw.column(name)
        if pa.types.is_string(column.type):
            row[name] = _strings(column)
        else:
            row[name] = column.to_numpy()
    mine, cells = decoder(row)
    count = int(mine.sum())
    if not count:
        return None
    kept = raw if count == len(mine) else raw.filter(pa.array(mine))
    columns: dict[str, Any] = {}
    for field in table.schema():
        if field.name in cells:
            columns[field.name] = _arrow(cells[field.name], field.type)
        else:
            columns[field.name] = kept.column(field.name)
    return pa.Table.from_pydict(columns, schema=table.schema())


def _arrow(cell: Cell, kind: pa.DataType) -> pa.Array:
    values, holds = cell[0], cell[1]
    mask = None if holds is None else ~holds
    if len(cell) == 3:
        return pa.DictionaryArray.from_arrays(
            pa.array(values, pa.int16(), mask=mask), pa.array(list(cell[2]), pa.string())
        )
    if pa.types.is_boolean(kind):
        return pa.array(values.astype(np.bool_), kind, mask=mask)
    return pa.array(np.where(mask, 0, values) if mask is not None else values, mask=mask).cast(kind, safe=False)
