"""Codes of oddities in ftrace text, declared once."""

from __future__ import annotations

from parsers.recording import Note, NoteCode

__all__ = ["NOTES", "note"]

NOTES: tuple[NoteCode, ...] = (
    NoteCode("ftrace-line", "error", "a line fits no known layout and follows no marker; skipped"),
    NoteCode("ftrace-long-line", "error", "a line longer than any event; skipped"),
    NoteCode("ftrace-lost", "warn", "the ring buffer dropped records"),
    NoteCode("ftrace-overrun", "warn", "the header says that older records were overwritten"),
    NoteCode("ftrace-payload", "info", "payloads that no declared shape fits; kept as text in ftrace_text"),
    NoteCode("ftrace-many-events", "warn", "more event names than any kernel has; records of the rest kept as text"),
    NoteCode("ftrace-buffer-started", "info", "the oldest record kept of a CPU is later than the start of the trace"),
    NoteCode("ftrace-clock", "warn", "stamps could not be brought to nanoseconds: their unit is not in the text"),
    NoteCode("ftrace-no-stamps", "warn", "records without a time stamp (function_graph)"),
    NoteCode("ftrace-truncated", "warn", "the last line has no end and may be cut: kept as text, event `(cut)`"),
    NoteCode("systrace-compressed", "error", "compressed atrace data could not be unpacked"),
)
SEVERITY = {code.code: code.severity for code in NOTES}


def note(code: str, text: str, offset: int = 0, cpu: int | None = None, count: int = 1) -> Note:
    """A note of a declared code; `offset` is a byte offset."""
    return Note(code, SEVERITY[code], text, offset, cpu, count)
