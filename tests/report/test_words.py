"""What the object of a finding and of an event is called."""

from __future__ import annotations

import re

import pytest

from replay.events import KINDS
from tests.conformance.test_callback_rules import GSI, US, VECTOR, replay, routed, stale
from tracetool.report.timeline import describe
from tracetool.report.words import noun, where

#: Words of the vocabulary's documentation to those of reports.
CALLED = {
    "vector": "vector", "gsi": "GSI", "INTID": "INTID", "irq": "irq", "pin": "IOAPIC pin", "channel": "HPET channel",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_objects_of_events_are_called_what_the_vocabulary_says(kind: object) -> None:
    documented = re.search(r"obj=(\w+)", str(kind))
    if documented and documented[1] in CALLED:
        assert noun(getattr(kind, "name")) == CALLED[documented[1]]  # noqa: B009 - any row of the vocabulary


def test_objects_of_callback_findings() -> None:
    """The stale line is a GSI's, the injections are of a vector, and each is called so."""
    found = {f.code.name: f for f in replay(routed(*stale(10 * US, 3))).findings}
    assert {name: f.obj for name, f in found.items()} == {
        "via-stale-assert": GSI, "via-spurious-inject": VECTOR, "via-inject-storm": VECTOR,
    }  # fmt: skip
    for name, finding in found.items():
        row = {"code": name, "obj": finding.obj, "dom": 1, "vcpu": 1}
        object_ = f"GSI {GSI}" if finding.obj == GSI else f"vector {VECTOR:#x}"
        assert where(row, "callback") == f"{object_}, d1v1"


def test_an_eoi_names_its_vector() -> None:
    row = dict.fromkeys(("vcpu", "dom", "cpu", "tgt", "val", "val2", "flags", "t_ns"))
    assert describe({**row, "kind": "via.eoi", "obj": 0x59}) == "via.eoi vector 0x59"
    assert describe({**row, "kind": "via.line", "obj": 28}) == "via.line GSI 28"
