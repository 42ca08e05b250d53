"""All declared xentrace events, and which form a record has: decided by id, word count, stamp and Xen version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from parsers.tables import Column, Table
from parsers.xentrace import events_hvm, events_hw, events_instrumented, events_pv, events_sched
from parsers.xentrace.layout import NEWEST, OLDEST, Event, Layout, Version

__all__ = ["ALL_EVENTS", "BY_ID", "UNKNOWN", "Form", "candidates", "forms", "sniff_versions"]

ALL_EVENTS: tuple[Event, ...] = (
    *events_pv.EVENTS, *events_sched.EVENTS, *events_hvm.EVENTS, *events_hw.EVENTS, *events_instrumented.EVENTS
)  # fmt: skip

#: Records whose id is not declared, or whose word count fits none of the declared forms.
UNKNOWN = Table(
    "unknown",
    "A record whose id is not declared or whose length fits no declared form; kept as recorded.",
    (
        Column("event", pa.uint32(), "28-bit event id as recorded"),
        Column("n_words", pa.uint8(), "length of the payload in words"),
        Column("words", pa.list_(pa.uint32()), "payload as recorded"),
    ),
)

BY_ID: dict[int, list[Event]] = {}
for _event in ALL_EVENTS:
    for _id in _event.ids:
        BY_ID.setdefault(_id, []).append(_event)


@dataclass(frozen=True, slots=True)
class Form:
    """An event in one of its forms."""

    event: Event
    layout: Layout


def forms(header: int) -> list[Form]:
    """Every declared form that a record with this header word can have, newest first."""
    event_id, words, stamped = header & 0x0FFFFFFF, header >> 28 & 7, bool(header >> 31)
    found = [
        Form(event, layout)
        for event in BY_ID.get(event_id, ())
        for layout in event.layouts
        if layout.words in (None, words)
        and layout.stamped in (None, stamped)
        and (not layout.ids or event_id in layout.ids)
    ]
    if not found:  # a stamp where the declaration expects none is no reason to lose the fields
        found = [
            Form(event, layout)
            for event in BY_ID.get(event_id, ())
            for layout in event.layouts
            if layout.words in (None, words) and (not layout.ids or event_id in layout.ids)
        ]
    return found


def candidates(header: int, version: Version, span: tuple[Version, Version]) -> tuple[Form | None, bool]:
    """The form of a record, and whether `version` was what decided.

    `span`: first and last Xen release that can have written the recording; with one possible form left the
    version does not matter. None: no declared form fits.
    """
    possible = forms(header)
    if len(possible) > 1:
        possible = [form for form in possible if _overlaps(form.layout, span)] or possible
    if len(possible) <= 1:
        return (possible[0] if possible else None), False
    fitting = [form for form in possible if form.layout.since <= version <= form.layout.until]
    return (fitting or possible)[0], True


def _overlaps(layout: Layout, span: tuple[Version, Version]) -> bool:
    return layout.since <= span[1] and span[0] <= layout.until


def sniff_versions(headers: Iterable[int]) -> tuple[Version, Version]:
    """First and last Xen release that can have written all these header words.

    A contradiction (a recording put together from several, damage) gives the whole range.
    """
    known = [possible for header in headers if (possible := forms(header))]
    span = (OLDEST, NEWEST)
    while True:
        first, last = span
        for possible in known:
            fitting = [form.layout for form in possible if _overlaps(form.layout, span)]
            first = max(first, min((layout.since for layout in fitting), default=NEWEST))
            last = min(last, max((layout.until for layout in fitting), default=OLDEST))
        if first > last:
            return OLDEST, NEWEST
        if (first, last) == span:
            return span
        span = first, last  # one record's answer can settle another's
