"""Effects of a what-if run, in columns: a long one has millions of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import overload

__all__ = ["Effects"]


class Effects:
    """What a guest or device would notice, as (t ns, what), in order; 12 bytes each. `what` is any integer."""

    __slots__ = ("_ids", "_known", "_times", "_whats")

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._times: array[int] = array("q")
        self._whats: array[int] = array("i")  # indices into `_known`: objects are few
        self._known: list[int] = []
        self._ids: dict[int, int] = {}
        for pair in pairs:
            self.append(pair)

    def append(self, pair: tuple[int, int]) -> None:
        """One more."""
        t, what = pair
        index = self._ids.get(what)
        if index is None:
            index = self._ids[what] = len(self._known)
            self._known.append(what)
        self._times.append(t)
        self._whats.append(index)

    def __len__(self) -> int:
        return len(self._times)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._times[index], self._known[self._whats[index]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        known = self._known
        return ((t, known[index]) for t, index in zip(self._times, self._whats, strict=True))

    def stored(self) -> tuple[list[int], bytes]:
        """What there is, and the columns as bytes of this machine."""
        return self._known, self._times.tobytes() + self._whats.tobytes()

    @classmethod
    def restored(cls, known: Iterable[int], columns: bytes) -> Effects:
        """The same again, from what `stored` gave."""
        made = cls()
        made._known = list(known)
        made._ids = {what: index for index, what in enumerate(made._known)}
        wide, narrow = made._times.itemsize, made._whats.itemsize
        split = len(columns) // (wide + narrow) * wide
        made._times.frombytes(columns[:split])
        made._whats.frombytes(columns[split:])
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Effects | list) and list(self) == list(other)
