"""Each recorded injection of the callback with its handler, its upcall and its EOI (spec S2, on merged recordings).

The hypervisor's recording shows injection and EOI, the guest's shows the handler, the upcall (the clearing of
evtchn_upcall_pending) and the work that came of it. On each vCPU the four follow one another. Where only one of the
two recordings runs nothing is missing: an injection counts as unmatched only once a later one has its handler again.

An injection right at the EOI of the one before is *repeated*: the line was still asserted when V5 looked at it. It is
harmless when its handler finds work (the flag was set again meanwhile, and this is how it is delivered), and also when
it finds none but the next does: the policies of V4 sample after the EOI, so one in vain remains (spec S2.4). From the
`storm_count`-th in vain in a row it is a storm.
"""

from __future__ import annotations

from typing import Final

from replay.events import NIL

__all__ = ["Matching"]

#: The counts, in the order in which they are shown.
NAMES: Final = (
    "matched_handler", "matched_upcall", "matched_eoi", "matched_all", "unmatched_injections", "unmatched_handlers",
    "repeated_injections", "repeated_with_work", "repeated_in_vain", "in_vain_harmless", "in_vain_in_storms",
)  # fmt: skip


class _Open:
    """The last injection on a vCPU, until the next one."""

    __slots__ = ("begun", "cleared", "eoi", "injected", "repeated", "worked")

    def __init__(self, injected: bool, repeated: bool) -> None:
        self.injected: bool = injected
        self.repeated: bool = repeated
        self.begun: bool = False
        self.cleared: bool = False
        self.eoi: bool = False
        self.worked: int = NIL  # 0 or 1 once the handler has returned


class Matching:
    """Counts of one domain. `ahead` handlers were seen before their injection: the guest's clock runs ahead."""

    def __init__(self, storm_count: int) -> None:
        self.storm_count = storm_count
        self.counts: dict[str, int] = dict.fromkeys(NAMES, 0)
        self.open: dict[int, _Open] = {}
        self.without_handler = 0  # since the last match: perhaps nobody recorded the guest there
        self.without_injection = 0
        self.any_matched = False
        self.in_vain = 0  # handlers in a row that found nothing

    def injected(self, vcpu: int, repeated: bool, ahead: bool) -> None:
        """The callback's vector was injected; `ahead`: the handler seen last belongs to it."""
        last = self.open.get(vcpu)
        mine = _Open(True, repeated)
        if ahead and last is not None and not last.injected:
            mine.begun, mine.cleared, mine.worked = last.begun, last.cleared, last.worked
            self.without_injection = max(self.without_injection - 1, 0)
        elif last is not None:
            self.close(last)
        self.open[vcpu] = mine

    def begun(self, vcpu: int) -> None:
        """The guest's handler starts."""
        last = self.open.get(vcpu)
        if last is None or last.begun:
            if last is not None:
                self.close(last)
            self.open[vcpu] = last = _Open(False, False)
            self.without_injection += 1
        last.begun = True

    def cleared(self, vcpu: int) -> None:
        """The upcall cleared the flag."""
        last = self.open.get(vcpu)
        if last is not None and last.begun:
            last.cleared = True

    def ended(self, vcpu: int, worked: bool) -> None:
        """The handler returned, and whether anything came of it."""
        last = self.open.get(vcpu)
        if last is not None and last.begun and last.worked == NIL:
            last.worked = int(worked)

    def eoi(self, vcpu: int) -> None:
        """The callback's vector was dismissed."""
        last = self.open.get(vcpu)
        if last is not None and last.injected:
            last.eoi = True

    def close(self, last: _Open) -> None:
        """The next one has come, or the end: what is known of this one is all that will be."""
        if not last.injected:
            return
        counts = self.counts
        counts["matched_eoi"] += last.eoi
        counts["repeated_injections"] += last.repeated
        if not last.begun:
            self.without_handler += 1
            return
        if self.any_matched:  # both recordings ran before and after
            counts["unmatched_injections"] += self.without_handler
            counts["unmatched_handlers"] += self.without_injection
        self.any_matched = True
        self.without_handler = self.without_injection = 0
        counts["matched_handler"] += 1
        counts["matched_upcall"] += last.cleared
        counts["matched_all"] += last.cleared and last.eoi
        if last.worked == 1:
            counts["repeated_with_work"] += last.repeated
            self.end_row()
        elif last.worked == 0:
            counts["repeated_in_vain"] += last.repeated
            self.in_vain += 1

    def end_row(self) -> None:
        """A handler found work: those before it that did not are judged."""
        name = "in_vain_harmless" if self.in_vain < self.storm_count else "in_vain_in_storms"
        self.counts[name] += self.in_vain
        self.in_vain = 0

    def finish(self) -> dict[str, int]:
        """All counts, with those that are still open."""
        for last in self.open.values():
            self.close(last)
        self.open.clear()
        self.end_row()
        return self.counts

    def forget(self) -> None:
        """Records were lost: what was open is let go, and nothing from before the next match is missing."""
        self.open.clear()
        self.any_matched = False
        self.end_row()
