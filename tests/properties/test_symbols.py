"""Names of kernel addresses: however the saved kallsyms text looks, they are those that a search line by line finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parsers.tracedat.symbols import FARTHEST, Symbols

#: Few values, so that symbols share addresses and addresses are asked for that have one.
ADDRESSES = st.sampled_from([0, 1, 0x10, 0xFFFFFFFF81000000, 0xFFFFFFFF81000010, 0xFFFFFFFFC0000000, (1 << 64) - 1])
NAMES = st.sampled_from(["a", "b_c", "d\t[mod]", "e\\f", "g h"])
LINES = st.one_of(
    st.tuples(ADDRESSES, NAMES).map(lambda pair: f"{pair[0]:016x} T {pair[1]}"),
    st.sampled_from(["", "T", "zz00000000000010 T x", "0000 0000 000010 T x", "10 T short", f"{77:016x}"]),
)


@given(st.lists(LINES, max_size=12), st.booleans(), st.lists(ADDRESSES, max_size=8))
def test_exact_names(text: list[str], ordered: bool, asked: list[int]) -> None:
    text = sorted(text) if ordered else text
    symbols = Symbols("\n".join(text).encode(), 8)
    for address in asked:
        names = [line.split(" ", 2)[2] for line in text if line.startswith(f"{address:016x} ")]
        expected = names[0].split("\t")[0].replace("\\", "\\\\") if names and address else None
        assert symbols.name(address) == expected


@given(
    st.lists(st.tuples(ADDRESSES, st.sampled_from(["a", "b", "c\t[mod]"])), max_size=8), ADDRESSES, st.integers(0, 9)
)
def test_surroundings(text: list[tuple[int, str]], address: int, add: int) -> None:
    address = min(address + add, (1 << 64) - 1)
    symbols = Symbols("".join(f"{at:016x} T {name}\n" for at, name in text).encode(), 8)
    starts = sorted({at for at, _ in text if at})
    below = [at for at in starts if at <= address]
    if not below or not address or address - below[-1] >= FARTHEST:
        assert symbols.around(address) is None
        return
    name, _, module = next(name for at, name in text if at == below[-1]).partition("\t")
    size = f"/0x{starts[len(below)] - below[-1]:x}" if len(below) < len(starts) else ""
    assert symbols.around(address) == f"{name}+0x{address - below[-1]:x}{size}" + (f" {module}" if module else "")
