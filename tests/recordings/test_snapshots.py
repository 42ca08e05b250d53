"""Debug-key dumps as evidence: a healthy real dump raises nothing, one bit changed in its text just what it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.shared import SAMPLES
from tracetool.cli import run as main
from tracetool.store import Dataset

REAL: str = pa.input_stream(str(SAMPLES / "xen-debug-keys.txt.zst"), compression="zstd").read().decode()
TRACE = SAMPLES / "xen-2l-dom0-idle.xentrace"
Capture = pytest.CaptureFixture[str]


def changed(*edits: tuple[str, str]) -> str:
    """The real dump with each `old` line's text, which occurs once, replaced."""
    text = REAL
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def runs_of(text: str, folder: Path, capsys: Capture, *more: str) -> dict[str, Any]:
    """Runs by system, with the findings above info, and the coverage."""
    dump, dataset = folder / "keys.txt", folder / "dataset"
    dump.write_text(text)
    assert main(["ingest", *(m if m != "DUMP" else str(dump) for m in more or ("DUMP",)), "-o", str(dataset), "--force",
                 "--json"]) == 0  # fmt: skip
    capsys.readouterr()
    main(["replay", str(dataset), "--json"])
    document = json.loads(capsys.readouterr().out)
    found = [f for run in document["runs"] for f in run["findings"]]
    return {
        "findings": found,
        "codes": sorted((f["code"], f["dom"], f["obj"]) for f in found),
        "verdicts": {run["system"]: run["verdict"] for run in document["runs"]},
        "rules": {c["rule"]: c["state"] for c in document["coverage"]},
    }


def test_the_real_dump_is_healthy(tmp_path: Path, capsys: Capture) -> None:
    result = runs_of(REAL, tmp_path, capsys)
    assert result["findings"] == []
    assert result["verdicts"] == {"evtchn": "clean", "apic": "clean"}
    assert result["rules"]["evtchn-stranded-pending"] == "inferred"  # one dump: assumed to last
    assert result["rules"]["fifo-pending-unlinked"] == "inferred"
    assert result["rules"]["ioapic-remote-irr-stuck"] == "inferred"  # no key dumps the local APICs
    assert result["rules"]["evtchn-binding-mismatch"] == "blind"  # the guest's side is not in a dump


#: One character of the real dump, and what it means.
DOCTORED = [
    pytest.param([("7 [0/0/0]: s=3 n=0 x=0 d=0 p=61", "7 [1/0/0]: s=3 n=0 x=0 d=0 p=61")],
                 [("evtchn-stranded-pending", 1, 7)], id="2l: pending, unmasked, selector clear"),
    pytest.param([("5 [0/1/0]: s=3 n=1 x=1 d=0 p=57", "5 [1/0/0]: s=3 n=1 x=1 d=0 p=57")],
                 [("evtchn-stranded-pending", 1, 5)], id="2l: on vcpu 1"),
    pytest.param([("7 [0/0/0]: s=3 n=0 x=0 d=0 p=61", "7 [1/0/1]: s=3 n=0 x=0 d=0 p=61")], [], id="2l: selected"),
    pytest.param([("7 [0/0/0]: s=3 n=0 x=0 d=0 p=61", "7 [1/1/0]: s=3 n=0 x=0 d=0 p=61")], [], id="2l: masked"),
    pytest.param([("61 [1/0/  0   ]", "61 [1/0/  -   ]")], [("fifo-pending-unlinked", 0, 61)], id="fifo: not linked"),
    pytest.param([("31 [0/0/  -   ]", "31 [1/0/  -   ]")], [("fifo-pending-unlinked", 0, 31)], id="fifo: never linked"),
    pytest.param([("31 [0/0/  -   ]", "31 [1/1/  -   ]")], [], id="fifo: masked"),
    pytest.param([("61 [1/0/  0   ]", "61 [1/0/B 0   ]")], [("fifo-busy-stuck", 0, 61)], id="fifo: busy"),
    pytest.param([(" 0b  00  0   1   0   0", " 0b  00  0   1   1   0")], [("ioapic-remote-irr-stuck", None, 11)],
                 id="remote IRR, vector in flight nowhere"),
    pytest.param([(" 0b  00  0   1   0   0", " 0b  00  0   1   1   0"),
                  ("vec:ca IO-APIC-level   status=030 aff:{0}/{0} in-flight=0",
                   "vec:ca IO-APIC-level   status=030 aff:{0}/{0} in-flight=1")], [], id="remote IRR, guest has it"),
    pytest.param([(" 0b  00  0   1   0   0", " 0b  00  0   1   1   0"),
                  ("vec:ca IO-APIC-level   status=030", "vec:ca IO-APIC-level   status=031")], [],
                 id="remote IRR, handler runs"),
    pytest.param([(" 0c  01  0   0   0   0", " 0c  01  0   0   1   0")], [], id="remote IRR of an edge means nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "expected"), DOCTORED)
def test_one_bit(
    edits: list[tuple[str, str]], expected: list[tuple[str, int | None, int]], tmp_path: Path, capsys: Capture
) -> None:
    result = runs_of(changed(*edits), tmp_path, capsys)
    assert result["codes"] == expected
    for finding in result["findings"]:  # walks back to the line of the dump, or of the word that it is in
        lines = (tmp_path / "keys.txt").read_text().splitlines()
        assert finding["offset"] is None or "(XEN)" in lines[finding["offset"] - 1]


def test_key_i_alone_shows_remote_irr_too(tmp_path: Path, capsys: Capture) -> None:
    """Without key z the entries come from key i."""
    head, _, rest = REAL.partition("(XEN) number of MP IRQ sources")
    text = head + rest.partition(".................................... done.\n")[2]
    old = "Pin 11: vec=ca delivery=Fixed dest=P status=0 polarity=0 irr=0 trig=L"
    assert old in text and "IRQ redirection table" not in text
    assert runs_of(text, tmp_path, capsys)["codes"] == []
    stuck = text.replace(old, old.replace("irr=0", "irr=1"))
    assert runs_of(stuck, tmp_path, capsys)["codes"] == [("ioapic-remote-irr-stuck", None, 11)]


def test_a_second_dump_is_the_second_look(tmp_path: Path, capsys: Capture) -> None:
    """A port that a later dump of the key shows handled was in transit; one that both show is stranded."""
    start, end = REAL.index("(XEN) 'e' pressed"), REAL.index("(XEN) MSI information")
    once = REAL[start:end]
    stranded = once.replace("7 [0/0/0]: s=3 n=0", "7 [1/0/0]: s=3 n=0")
    assert stranded != once
    assert runs_of(stranded + once, tmp_path, capsys)["codes"] == []
    assert runs_of(stranded + stranded, tmp_path, capsys)["codes"] == [("evtchn-stranded-pending", 1, 7)]


def test_confidence_is_that_of_the_weakest_evidence(tmp_path: Path, capsys: Capture) -> None:
    """What one dump shows is assumed to last: a finding of it is inferred, one severity less. A second dump is proof;
    what only the last one shows is again assumed to last."""
    start, end = REAL.index("(XEN) 'e' pressed"), REAL.index("(XEN) MSI information")
    once = REAL[start:end]
    port7 = once.replace("7 [0/0/0]: s=3 n=0", "7 [1/0/0]: s=3 n=0")
    port8 = port7.replace("61 [1/0/  0   ]", "61 [1/0/  -   ]")

    def sure(text: str) -> list[tuple[str, str, int]]:
        result = runs_of(text, tmp_path, capsys)
        return sorted((f["code"], f["severity"], f["confidence"]) for f in result["findings"])

    stranded, unlinked = "evtchn-stranded-pending", "fifo-pending-unlinked"
    assert sure(port8) == [(stranded, "warn", 50), (unlinked, "warn", 50)]
    assert sure(port7 + port8) == [(stranded, "error", 100), (unlinked, "warn", 50)]
    assert sure(port8 + port8) == [(stranded, "error", 100), (unlinked, "error", 100)]


#: Keys q and I as Xen 4.17 prints them; no real dump of them is at hand.
GUEST = """(XEN) 'q' pressed -> dumping domain info (now = 272000000000)
(XEN) General information for domain 1:
(XEN)     refcnt=3 dying=0 pause_count=0
(XEN) VCPU information and callbacks for domain 1:
(XEN)   UNIT0 affinities: hard={0-3} soft={0-3}
(XEN)     VCPU0: CPU2 [has=F] poll=0 upcall_pend=01 upcall_mask=00 \n\
(XEN)     pause_count=0 pause_flags=1
(XEN) 'I' pressed -> dumping HVM irq info
(XEN) Domain 1:
(XEN) PCI 0x00000000000000000000000000000000 ISA 0x00000000 ROUTE 5 10 11 5
(XEN) GSI [0 - 7] 00 00 00 00 00 00 00 00
(XEN) GSI [18 - 1f] 00 00 00 00 01 00 00 00
(XEN) Link 00 00 00 00
(XEN) Callback via 2:0x3, asserted
(XEN) 'e' pressed -> dumping event-channel info
(XEN) Event channel information for domain 1:
(XEN)        1 [1/0/1]: s=3 n=0 x=0 d=0 p=54
"""


def test_vcpus_and_callback_lines(tmp_path: Path, capsys: Capture) -> None:
    """Key q: blocked with an upcall pending. Key I: the flag is set and the line is not asserted."""
    blocked = ("evtchn-lost-wakeup-block", 1, None)
    assert runs_of(GUEST, tmp_path, capsys)["codes"] == [blocked]
    awake = GUEST.replace("pause_flags=1", "pause_flags=0")
    assert runs_of(awake, tmp_path, capsys)["codes"] == []
    masked = GUEST.replace("upcall_mask=00", "upcall_mask=01")
    assert runs_of(masked, tmp_path, capsys)["codes"] == []
    dropped = awake.replace("0x3, asserted", "0x3, not asserted").replace("00 00 00 00 01", "00 00 00 00 00")
    result = runs_of(dropped, tmp_path, capsys)
    assert [code for code, _, _ in result["codes"]] == ["via-late-assert"]
    assert result["rules"]["via-late-assert"] == "inferred"


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_beside_a_recording(before: bool, tmp_path: Path, capsys: Capture) -> None:
    """Named after the recording the dump is its end, named before it only bindings and entries of it count."""
    text = changed(("7 [0/0/0]: s=3 n=0 x=0 d=0 p=61", "7 [1/0/0]: s=3 n=0 x=0 d=0 p=61"))
    order = ("DUMP", str(TRACE)) if before else (str(TRACE), "DUMP")
    result = runs_of(text, tmp_path, capsys, *order)
    codes = [c for c in result["codes"] if c[0].startswith(("evtchn", "fifo", "ioapic"))]
    assert codes == ([] if before else [("evtchn-stranded-pending", 1, 7)])
    assert result["rules"].get("evtchn-stranded-pending", "blind") == ("blind" if before else "inferred")
    alone, beside = tmp_path / "alone", tmp_path / "dataset"
    assert main(["ingest", str(TRACE), "-o", str(alone), "--json"]) == 0
    capsys.readouterr()
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (alone, beside)]
    dump = next(i for i in manifests[1]["inputs"] if i["source"] == "keys.txt")
    assert "when exactly is unknown" in dump["clock"]["how"]
    # Key i names the HPET's interrupts: the recording no longer has to guess them.
    assert [m["observed"]["hpet.handler.begin"]["conf"] for m in manifests] == [50, 80]
    assert manifests[0]["facts"]["hpet_channels"] == manifests[1]["facts"]["hpet_channels"]
    verdicts = []
    for folder in (alone, beside):
        main(["replay", str(folder), "--json", "--system", "hpet"])
        run = json.loads(capsys.readouterr().out)["runs"][0]
        verdicts.append((run["verdict"], sorted((f["code"], f["severity"]) for f in run["findings"])))
    assert verdicts[0] == verdicts[1]


def test_a_dump_with_its_own_time_can_be_placed(tmp_path: Path, capsys: Capture) -> None:
    stamped = "".join(
        f"(XEN) [  {272 + n // 1000}.{n % 1000:03}000] {line[6:]}\n" for n, line in enumerate(GUEST.splitlines())
    )
    result = runs_of(stamped, tmp_path, capsys)
    assert [code for code, _, _ in result["codes"]] == ["evtchn-lost-wakeup-block"]
    runs_of(stamped, tmp_path, capsys, str(TRACE), "DUMP", "--offset", "keys.txt=+1s")
    manifest = json.loads((tmp_path / "dataset" / "manifest.json").read_text())
    dump = next(i for i in manifest["inputs"] if i["source"] == "keys.txt")
    assert (dump["clock"]["kind"], dump["span"]["t0_ns"]) == ("stated", 1_000_000_000)


def test_snapshots_alone_are_not_merged(tmp_path: Path, capsys: Capture) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(REAL)
    other = SAMPLES / "proc-interrupts-hpet.txt"
    assert main(["ingest", str(keys), str(other), "-o", str(tmp_path / "d")]) == 2
    assert "snapshots" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["proc-interrupts-hpet.txt", "proc-timer_list.txt", "lsevtchn-hvm.txt"])
def test_other_snapshots_beside_a_recording_are_kept_as_tables(name: str, tmp_path: Path, capsys: Capture) -> None:
    dataset = tmp_path / "d"
    assert main(["ingest", str(TRACE), str(SAMPLES / name), "-o", str(dataset), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"]["total"] == TRACE.stat().st_size + (SAMPLES / name).stat().st_size
    assert set(document["records"]) & {"interrupt", "hrtimer", "lsevtchn"}


def said(path: Path, folder: Path, capsys: Capture) -> dict[str, Any]:
    """The facts of an ingested snapshot, all of which `info` prints beside the system."""
    assert main(["ingest", str(path), "-o", str(folder / "d"), "--force", "--json"]) == 0
    capsys.readouterr()
    facts: dict[str, Any] = json.loads((folder / "d" / "manifest.json").read_text())["facts"]
    main(["info", str(folder / "d")])
    printed = capsys.readouterr().out
    assert all(facts[system] in printed for system in ("hpet", "apic") if system in facts)
    return facts


def test_proc_interrupts_tell_of_channels_on_other_cpus(tmp_path: Path, capsys: Capture) -> None:
    """The one hpet4 interrupt on CPU 2 and the one hpet5 on CPU 3, which lie in no recording of that machine."""
    path = SAMPLES / "proc-interrupts-hpet.txt"
    told = said(path, tmp_path, capsys)["hpet"]
    assert "1 of 10250 interrupts of hpet4 on CPU 2, its own is CPU 1" in told
    assert "1 of 7044 interrupts of hpet5 on CPU 3, its own is CPU 2" in told
    assert "hpet3" not in told and "hpet6" not in told and "when is not told" in told
    text = path.read_text()
    healthy = tmp_path / "healthy.txt"
    own = text.replace("10249          1", "10250          0").replace("7043          1", "7044          0")
    healthy.write_text(own)
    assert "every HPET channel on its own CPU since boot" in said(healthy, tmp_path, capsys)["hpet"]
    later = tmp_path / "later.txt"  # two copies: what came between them
    again = text.replace("       7936 ", "       8936 ").replace("10249          1", "10349          4")
    later.write_text(text + again)
    told = said(later, tmp_path, capsys)["hpet"]
    assert told.startswith("/proc/interrupts between the first and the last copy: ")
    assert "3 of 103 interrupts of hpet4 on CPU 2" in told
    assert "hpet5" not in told


def test_other_keys_are_for_reading(tmp_path: Path, capsys: Capture) -> None:
    facts = said(SAMPLES / "xen-debug-keys.txt.zst", tmp_path, capsys)
    assert facts["hpet"].startswith("key a: 1 of 12 pending timers overdue, the worst by 7788 us on CPU 2")
    assert "key c: residency of C-states" in facts["hpet"]
    assert "IRQ 24 to APIC 1, IRQ 25 to APIC 2, IRQ 26 to APIC 1" in facts["apic"]
    assert "8 pending timers, none overdue" in said(SAMPLES / "proc-timer_list.txt", tmp_path, capsys)["hpet"]


def test_boot_stamps_tie_to_nothing_and_that_is_said(tmp_path: Path, capsys: Capture) -> None:
    """The recording's first TSC tells when the machine was reset: a dump is no older than its stamp."""
    assert main(["ingest", str(TRACE), "-o", str(tmp_path / "alone"), "--json"]) == 0
    capsys.readouterr()
    clock = json.loads((tmp_path / "alone" / "manifest.json").read_text())["clock"]
    reset_s = int(clock["tsc0"] / clock["hz"])
    for second, words in ((reset_s - 5, None), (reset_s + 100_000, "after the last record")):
        stamped = "".join(
            f"(XEN) [{second + n // 1000:6}.{n % 1000:03}000] {line[6:]}\n" for n, line in enumerate(GUEST.splitlines())
        )
        dump = tmp_path / "keys.txt"
        dump.write_text(stamped)
        for order, severity in (((TRACE, dump), "info"), ((dump, TRACE), "warn" if words else "info")):
            assert main(["ingest", *map(str, order), "-o", str(tmp_path / "d"), "--force", "--json"]) == 0
            capsys.readouterr()
            notes = [n for n in Dataset.open(tmp_path / "d").notes() if n["code"] == "boot-stamps-not-tied"]
            assert [n["severity"] for n in notes] == [severity]
            assert "not tied" in notes[0]["text"] and (words or "not tied") in notes[0]["text"]
            assert ("came" in notes[0]["text"]) == (words is not None)
