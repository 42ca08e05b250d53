"""Packets of a Perfetto trace: tracks, slices, moments and arrows, on one packet sequence and one clock."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from replay.declare import UsageError
from tracetool.terminal import clean

__all__ = ["Path_", "Writer", "require"]

#: Names of a track and of those above it, outermost first.
Path_ = tuple[str, ...]


def require() -> tuple[Any, Any]:
    """The protobuf module and the streaming builder of the `perfetto` package; UsageError says how to get it."""
    try:
        protos = import_module("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
        builder = import_module("perfetto.trace_builder.proto_builder")
    except ImportError:
        raise UsageError("a Perfetto trace needs the perfetto package: pip install 'tracetool[perfetto]'") from None
    return protos, builder


class Writer:
    """Packets out; tracks are described when they are first used, numbered in that order."""

    def __init__(self, file: Any, low: int, high: int) -> None:
        protos, builder = require()
        self.event = protos.TrackEvent
        self.builder = builder.StreamingTraceProtoBuilder(file)
        self.tracks: dict[tuple[Path_, int], int] = {}
        self.low, self.high = low, high
        self.shift = -min(0, low)  # Perfetto knows no time before zero
        self.slices = 0
        self.first = True

    def track(self, path: Path_, lane: int = 0) -> int:
        """Number of a track; the tracks above it exist from then on as well."""
        number = self.tracks.get((path, lane))
        if number is None:
            parent = self.track(path[:-1]) if len(path) > 1 else 0
            number = self.tracks[path, lane] = len(self.tracks) + 1
            packet = self.builder.create_packet()
            packet.trusted_packet_sequence_id = 1
            packet.track_descriptor.uuid = number
            packet.track_descriptor.name = clean(path[-1])
            if parent:
                packet.track_descriptor.parent_uuid = parent
            self._write(packet)
        return number

    def _write(self, packet: Any) -> None:
        if self.first:
            packet.sequence_flags = 1  # SEQ_INCREMENTAL_STATE_CLEARED: nothing from before is missing
            self.first = False
        self.builder.write_packet(packet)

    def _packet(self, t: int, kind: int, track: int) -> Any:
        packet = self.builder.create_packet()
        packet.trusted_packet_sequence_id = 1
        packet.timestamp = max(0, t + self.shift)
        packet.track_event.type = kind
        packet.track_event.track_uuid = track
        return packet

    def slice(self, track: int, t0: int, t1: int, name: str, args: Mapping[str, Any]) -> None:
        """A closed slice, cut to the window."""
        if t1 < self.low or t0 > self.high:
            return
        packet = self._packet(max(t0, self.low), self.event.TYPE_SLICE_BEGIN, track)
        packet.track_event.name = clean(name)
        annotate(packet.track_event, args)
        self._write(packet)
        self._write(self._packet(min(t1, self.high), self.event.TYPE_SLICE_END, track))
        self.slices += 1

    def instant(
        self, track: int, t: int, name: str, args: Mapping[str, Any], *, flow: int | None = None, last: bool = False
    ) -> None:
        """A moment; `flow` joins it to others with an arrow, which ends here when `last`."""
        if not self.low <= t <= self.high:
            return
        packet = self._packet(t, self.event.TYPE_INSTANT, track)
        packet.track_event.name = clean(name)
        if flow is not None:
            (packet.track_event.terminating_flow_ids if last else packet.track_event.flow_ids).append(flow)
        annotate(packet.track_event, args)
        self._write(packet)


def annotate(event: Any, args: Mapping[str, Any]) -> None:
    for name, value in args.items():
        if value is None or value == "":
            continue
        annotation = event.debug_annotations.add()
        annotation.name = name
        if isinstance(value, int):
            annotation.int_value = value
        else:
            annotation.string_value = clean(str(value))
