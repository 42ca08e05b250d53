"""What holds for every reader on any bytes, and coverage-guided fuzzing of it.

    python -m tests.damage.fuzz [--reader NAME] [--seconds N]     needs the extra: tracetool[fuzz]
    python -m tests.damage.fuzz --replay                          the corpus only, without atheris
    python -m tests.damage.fuzz --collect FOLDER                  inputs left there by `--out` into the corpus

The property tests, the fuzzer and the replay of the corpus share one entry point, `check`. An input that breaks it is
written to `tests/damage/corpus/<reader>/found-<hash>` and stays there as a test; `kept-<hash>` are inputs that broke
nothing and reach lines of the parsers that no smaller one reaches. See `.ci/fuzz`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pyarrow as pa

import parsers
from parsers.formats import FORMATS, reader_class, sniff
from parsers.open import HEAD_BYTES, open_recording
from parsers.recording import Chunk, Gap, Note, Reader, ReadOptions, RecordingError
from parsers.tables import COMMON

__all__ = ["CORPUS", "OPEN", "Read", "check", "check_reader", "corpus", "corpus_name", "fuzz_bytes"]

CORPUS = Path(__file__).parent / "corpus"
#: Not a reader: decompression, recognition, and then whichever reader it is.
OPEN = "open"
#: Inputs above this are cut by the fuzzer: what takes long finds little.
FUZZ_BYTES = {"trace.dat": 24 << 10, "xentrace": 2 << 10, OPEN: 1 << 10}
FUZZ_TEXT_BYTES = 1500
#: What `--collect` keeps: inputs and bytes for each reader.
KEPT, KEPT_BYTES = 14, 72 << 10


@dataclass
class Read:
    """All that a reader gave."""

    reader: Reader
    chunks: list[Chunk]
    tables: dict[str, list[pa.Table]] = field(default_factory=dict)

    @property
    def gaps(self) -> list[Gap]:
        return [gap for chunk in self.chunks for gap in chunk.gaps]

    @property
    def notes(self) -> list[Note]:
        return [note for chunk in self.chunks for note in chunk.notes]

    def rows(self, but: tuple[str, ...] = ("seq", "t_ns", "t_err_ns")) -> list[tuple[int, str, str]]:
        """(offset, table, values) of every record, in the order of the file; `seq` and times depend on all others."""
        found = []
        for name, parts in self.tables.items():
            for part in parts:
                kept = part.drop_columns([c for c in but if c in part.column_names])
                found += [(row["offset"], name, repr(row)) for row in kept.to_pylist()]
        return sorted(found)


def check(data: bytes, name: str) -> Read | None:
    """Any bytes: tables, gaps and notes as declared, or RecordingError (None). AssertionError for everything else.

    `name` is a format of `FORMATS`, or `OPEN` for the way a file takes.
    """
    if name == OPEN:
        return _check_open(data)
    return check_reader(io.BytesIO(data), len(data), name)


def check_reader(stream: Any, size: int, name: str) -> Read | None:
    """As `check`, for a stream of `size` bytes."""
    cls = reader_class(name)
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    assert cls.sniff(head) in (True, False)
    try:
        reader = cls(stream, ReadOptions(source="x"))
        chunks = []
        for chunk in reader.chunks():
            chunks.append(chunk)
    except RecordingError as error:
        _check_line(str(error))
        assert 0 <= error.offset <= size, f"offset {error.offset} of {size} bytes"
        return None
    read = Read(reader, chunks)
    _check_account(read, size)
    _check_tables(read)
    _check_words(read, size)
    return read


def _check_open(data: bytes) -> Read | None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data)
        file.flush()
        try:
            with open_recording(file.name, max_bytes=64 << 20) as opened:
                cls = sniff(opened.head())
                if opened.truncated is not None:
                    _check_line(opened.truncated)
                if cls is None:
                    return None
                return check_reader(opened.stream, opened.size, cls.format)
        except RecordingError as error:
            _check_line(str(error))
            return None


def _check_line(text: str) -> None:
    assert text and "\n" not in text and len(text) < 2000, text


def _check_account(read: Read, size: int) -> None:
    account = read.reader.accounting
    assert account.total == size, f"{account.total} of {size} bytes accounted for"
    assert account.parsed + account.skipped == size and account.parsed >= 0 <= account.skipped, account


def _check_tables(read: Read) -> None:
    common = [column.name for column in COMMON]
    last = -1
    for chunk in read.chunks:
        seqs: list[int] = []
        for name, table in chunk.tables.items():
            declared = read.reader.tables[name].schema()
            assert table.schema.equals(declared), f"{name}: {table.schema} is not {declared}"
            assert table.column_names[: len(common)] == common
            table.validate(full=True)
            read.tables.setdefault(name, []).append(table)
            own = table["seq"].to_pylist()
            assert own == sorted(own), f"{name}: not in order"
            seqs += own
        if seqs:
            assert min(seqs) > last, "seq of a chunk before"
            last = max(seqs)
    assert all(count >= 0 for count in read.reader.counts.values())


def _check_words(read: Read, size: int) -> None:
    codes = {code.code: code.severity for code in read.reader.note_codes}
    for note in read.notes:
        assert codes.get(note.code) == note.severity, f"undeclared {note}"
        _check_line(note.text)
        assert 0 <= note.offset <= size + 1 and note.count >= 1, note  # lines count from 1
    for gap in read.gaps:
        assert 0 <= gap.offset <= size + 1 and 0 <= gap.length <= size, gap
        assert gap.lost is None or gap.lost >= 0, gap
        assert "\n" not in gap.text


# -- corpus --------------------------------------------------------------------------------------------------------


def corpus_name(reader: str) -> str:
    """Folder of a reader's inputs."""
    return reader.replace(".", "-")


def corpus(reader: str) -> Iterator[Path]:
    """Inputs that were interesting once."""
    yield from sorted((CORPUS / corpus_name(reader)).glob("*"))


# -- fuzzing -------------------------------------------------------------------------------------------------------


def _seeds(reader: str) -> list[bytes]:
    """What the fuzzer starts from: the whole small file once, and pieces of it. Time goes by kinds of events more than
    by bytes (every kind is a table), so pieces of few lines are run ten times as often."""
    import gzip

    from tests.damage.small_files import small_file

    kept = [p.read_bytes() for p in corpus(reader)]
    if reader == OPEN:
        some = [small_file(name)[:600] for name in ("xentrace", "ftrace", "qemu")]
        packed = [pa.compress(data, "zstd", asbytes=True) for data in some] + [gzip.compress(data) for data in some]
        return [b"".join(data.splitlines(keepends=True)[:3]) for data in some] + packed + kept
    whole = small_file(reader)
    if reader == "trace.dat":  # one structure: pieces are nothing
        return [whole, *kept]
    if reader == "xentrace":  # whole windows, and a few records of the first
        return [whole, whole[: len(whole) // 2], *(whole[:size] for size in (24, 60, 100, 200)), *kept]
    lines = whole.splitlines(keepends=True)
    pieces = [b"".join(lines[i : i + 3]) for i in range(0, len(lines), 3)]
    heads = [b"".join(lines[:n]) for n in (1, 2, 4, 8, 16)]
    return [whole, *heads, *pieces, *(b"".join([*lines[:2], piece]) for piece in pieces[1:]), *kept]


def _words(seeds: list[bytes]) -> bytes:
    """A dictionary for libFuzzer: words and punctuation of the seeds, which mutation alone seldom makes."""
    word = re.compile(rb"[A-Za-z_][\w.-]{2,24}|0x[0-9a-f]+|[ -/:-@\[-`{-~]{2,6}")
    found = {match for seed in seeds for match in word.findall(seed)}
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in sorted(found)[:600])
    return "".join(f'"{word}"\n' for word in quoted).encode()


def _fuzz(reader: str, seconds: int, keep: Path) -> NoReturn:
    """The fuzzer's own process: ends when the time is over or an input breaks `check`, which it leaves in `keep`."""
    import atheris  # type: ignore[import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["parsers"], enable_loader_override=False):
        for name, _, _ in FORMATS:
            reader_class(name)
        check(b"", reader)

    longest = fuzz_bytes(reader)

    def one(data: bytes) -> None:
        check(data[:longest], reader)

    flags = [f"-max_total_time={seconds}", f"-max_len={longest}", "-timeout=20", "-rss_limit_mb=2500"]
    flags += [f"-artifact_prefix={keep}/", f"-dict={keep}/words", "-print_final_stats=1", "-verbosity=1"]
    flags += ["-entropic_scale_per_exec_time=1", "-len_control=20"]
    atheris.Setup([sys.argv[0], *flags, str(keep / "corpus")], one)
    atheris.Fuzz()
    raise SystemExit(0)


def fuzz_bytes(reader: str) -> int:
    """Longest input that the fuzzer makes for a reader."""
    return FUZZ_BYTES.get(reader, FUZZ_TEXT_BYTES)


def _run(reader: str, seconds: int, out: Path | None) -> tuple[int, list[Path]]:
    """Executions, and the inputs found (kept in the corpus). `out` gets all inputs that reached something new."""
    found: list[Path] = []
    executions = 0
    end = time.monotonic() + seconds
    while (left := int(end - time.monotonic())) > 2:
        with tempfile.TemporaryDirectory() as scratch:
            keep = Path(scratch)
            (keep / "corpus").mkdir()
            seeds = _seeds(reader)
            for number, seed in enumerate(seeds):
                (keep / "corpus" / f"seed-{number}").write_bytes(seed[: fuzz_bytes(reader)])
            (keep / "words").write_bytes(_words(seeds))
            command = [sys.executable, "-m", "tests.damage.fuzz", "--child", "--reader", reader]
            done = subprocess.run(
                [*command, "--seconds", str(left), "--keep", scratch], capture_output=True, text=True,
                errors="replace", check=False, env={**os.environ, "POLARS_MAX_THREADS": "1"},
            )  # fmt: skip
            stats = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
            executions += int(stats[-1].split()[-1]) if stats else 0
            inputs = [p for p in keep.iterdir() if p.name.startswith(("crash-", "timeout-", "oom-", "leak-", "slow-"))]
            for path in inputs:
                place = CORPUS / corpus_name(reader)
                place.mkdir(parents=True, exist_ok=True)
                kind = "found" if path.name.startswith("crash-") else path.name.partition("-")[0]
                target = place / f"{kind}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
                target.write_bytes(path.read_bytes()[: fuzz_bytes(reader)])
                found.append(target)
            if out is not None:
                shutil.copytree(keep / "corpus", out / corpus_name(reader), dirs_exist_ok=True)
            if done.returncode and not inputs:
                print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
                raise SystemExit(f"{reader}: the fuzzer failed with {done.returncode}")
            if inputs:
                print("\n".join(done.stderr.splitlines()[-60:]), file=sys.stderr)
                break  # to be mended before it is worth to go on
    return executions, found


def _lines(data: bytes, reader: str) -> frozenset[tuple[str, int, int]]:
    """Jumps between lines of the parsers that an input makes."""
    seen: set[tuple[str, int, int]] = set()
    place = str(Path(parsers.__file__).parent)

    def follow(frame: FrameType, event: str, _: object) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(place):
            return None
        last = frame.f_lineno

        def lines(frame: FrameType, event: str, _: object) -> Any:
            nonlocal last
            if event == "line":
                seen.add((file, last, frame.f_lineno))
                last = frame.f_lineno
            return lines

        return lines

    sys.settrace(follow)
    try:
        check(data, reader)
    finally:
        sys.settrace(None)
    return frozenset(seen)


def _collect(reader: str, folder: Path) -> list[Path]:
    """Fill the corpus of a reader from a folder of inputs: each adds the most jumps for its size, until none does."""
    inputs = {p.read_bytes()[: fuzz_bytes(reader)] for p in sorted((folder / corpus_name(reader)).glob("*"))}
    _lines(b"", reader)
    reached = {data: _lines(data, reader) for data in sorted(inputs)}
    place = CORPUS / corpus_name(reader)
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob("kept-*"):
        old.unlink()
    done: set[tuple[str, int, int]] = set()
    kept: list[Path] = []
    left = KEPT_BYTES
    while reached and len(kept) < KEPT:
        data = max(reached, key=lambda d: (len(reached[d] - done) / (200 + len(d)), d))
        new = reached.pop(data) - done
        if not new:
            break
        if len(data) > left:
            continue
        done |= new
        left -= len(data)
        kept.append(place / f"kept-{hashlib.sha256(data).hexdigest()[:12]}")
        kept[-1].write_bytes(data)
    return kept


def _replay(readers: list[str]) -> int:
    bad = 0
    for reader in readers:
        for path in corpus(reader):
            try:
                check(path.read_bytes(), reader)
            except Exception as error:  # the point of it
                bad += 1
                print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr)
    return bad


def main() -> int:
    """Command line: see the module's text. Exit code 1 when something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = [name for name, _, _ in FORMATS] + [OPEN]
    parser.add_argument("--reader", action="append", choices=names, help="default: all, one after the other")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--replay", action="store_true", help="run the corpus only")
    parser.add_argument("--out", type=Path, help="copy all inputs that reached something new there, for --collect")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="choose the corpus from inputs left by --out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    readers = given.reader or names
    if given.child:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _fuzz(readers[0], given.seconds, given.keep)
    if given.replay:
        return 1 if _replay(readers) else 0
    if given.collect:
        for reader in readers:
            print(f"{reader}: {len(_collect(reader, given.collect))} inputs kept", flush=True)
        return 0
    worst = 0
    for reader in readers:
        begin = time.monotonic()
        executions, found = _run(reader, given.seconds, given.out)
        rate = executions / (time.monotonic() - begin)
        told = f"{reader}: {executions} executions in {given.seconds} s ({rate:.0f}/s), {len(found)} found"
        print(" ".join([told, *map(str, found)]))
        sys.stdout.flush()
        worst |= bool(found)
    return worst


if __name__ == "__main__":
    sys.exit(main())
