"""What the commands do that look closer: explain, query, export, shrink, diff."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from replay.declare import UsageError
from tracetool import commands, exits, terminal
from tracetool.output import spare_inputs
from tracetool.request import Request, check_severity, open_dataset, replayed
from tracetool.store import Dataset

__all__ = ["diff", "explain", "export", "query", "shrink"]

#: Rows that go to stdout when nobody says how many.
ROWS: Final = 100


# -- explain -------------------------------------------------------------------------------------------------------


def explain(request: Request, finding: str | None, *, json: bool, show_python: bool) -> int:
    """`tracetool explain CODE` and `tracetool explain DATASET [FINDING]`."""
    target = request.target
    if finding is None and target in commands.codes() and not Path(target).exists():
        if show_python:
            raise UsageError("--show-python needs a finding: tracetool explain DATASET FINDING --show-python")
        return commands.explain(target, json=json)
    if finding is None and not Path(target).exists():
        return commands.explain(target, json=json)  # says which codes are nearly called so
    from tracetool import story

    dataset = open_dataset(target, request.options)
    if finding is None:
        records, text = story.listing(replayed(dataset, request.settings()), dataset)
        print(jsonlib.dumps({"schema": 1, "findings": records}) if json else text)
        return exits.CLEAN
    settings = request.settings()
    own = [choice for choice in settings.policies if choice.cls is not None]
    chosen = story.find(
        dataset, finding, settings.values, own=own, recorded=settings.recorded, keep=settings.keep
    )
    if json:
        print(jsonlib.dumps(story.document(dataset, chosen)))
    elif show_python:
        print("\n".join(story.python_lines(dataset, chosen)))
    else:
        terminal.show(story.told(dataset, chosen))
    return exits.CLEAN


# -- query ---------------------------------------------------------------------------------------------------------


def query(
    request: Request,
    sql: str | None,
    *,
    table: str | None,
    output: Path | None,
    format: str | None,
    limit: int | None,
    json: bool,
) -> int:
    """`tracetool query`."""
    from tracetool import query as q

    formats = set(q.FORMATS.values())
    if format is not None and format not in formats:
        raise UsageError(f"--format wants {', '.join(sorted(formats))}, not {format!r}")
    if sql is not None and table is not None:
        raise UsageError("give either a query or --table, not both")
    if sql is None and output is not None:
        raise UsageError("-o needs a query: tracetool query DATASET 'SELECT …' -o FILE")
    if output is None and format in ("parquet", "arrow"):
        raise UsageError(f"{format} is not for a terminal: give -o FILE")
    spare_inputs((output,), request.target)
    dataset = open_dataset(request.target, request.options)
    if sql is None:
        return _help(dataset, table, json=json)
    bound = limit if limit is not None or output is not None else ROWS
    answer = q.ask(dataset, sql, limit=bound, runs=lambda: replayed(dataset, request.settings()))
    if output is not None:
        size = q.write_frame(answer.frame, output, format)
        terminal.note(f"{output}: {answer.frame.height} rows, {size} bytes")
    elif json or format == "json":
        print(q.json_text(answer.frame, answer.more))
    elif format == "csv":
        text = q.csv_text(answer.frame)
        if sys.stdout.isatty():  # a program gets the data, a terminal gets nothing that controls it
            text = "".join(terminal.clean(line) + "\n" for line in text.splitlines())
        sys.stdout.write(text)
    else:
        print(q.render_frame(answer.frame))
    if answer.more:
        terminal.note(f"only the first {bound} rows; for more give --limit N, or -o FILE for all")
    return exits.CLEAN


def _help(dataset: Dataset, table: str | None, *, json: bool) -> int:
    """Tables, or the columns of one."""
    from tracetool import query as q

    if table is not None:
        columns = q.columns_of(dataset, table)
        if json:
            print(jsonlib.dumps({"schema": 1, "table": table, "columns": columns}))
        else:
            _listed([(c["column"], c["type"], c["unit"], c["doc"]) for c in columns])
        return exits.CLEAN
    tables = q.tables_of(dataset)
    if json:
        print(jsonlib.dumps({"schema": 1, "tables": tables}))
    else:
        counts = [("" if t["rows"] is None else f"{t['rows']:,}") for t in tables]
        _listed([(q.quoted(t["table"]), n, t["doc"]) for t, n in zip(tables, counts, strict=True)])
    return exits.CLEAN


def _listed(rows: Sequence[tuple[str, ...]]) -> None:
    """Aligned columns, the last one as it is."""
    cells = [[terminal.clean(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    for row in cells:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        print(f"{head}  {row[-1]}".rstrip())


# -- export --------------------------------------------------------------------------------------------------------


def export(request: Request, output: Path, *, start: float | None, end: float | None, json: bool) -> int:
    """`tracetool export --perfetto`."""
    from tracetool.export.perfetto import export as write_trace
    from tracetool.export.perfetto import require

    require()  # before minutes of work
    spare_inputs((output,), request.target)
    dataset = open_dataset(request.target, request.options)
    runs = replayed(dataset, request.settings())
    with terminal.progress_bar() as bar:
        done = write_trace(dataset, runs, output, start_s=start, end_s=end, progress=bar)
    if json:
        print(jsonlib.dumps({"schema": 1, "output": str(output), **done}))
    else:
        print(f"{terminal.clean(str(output))}  {done['bytes'] / 1e6:.1f} MB, {done['tracks']} tracks, "
              f"{done['slices']} slices, {done['findings']} findings; open it at https://ui.perfetto.dev")  # fmt: skip
        if done["gaps_without_time"]:
            terminal.note(f"{done['gaps_without_time']} gaps have no known time and are not drawn")
    return exits.CLEAN


# -- shrink --------------------------------------------------------------------------------------------------------


def shrink(request: Request, finding: str, output: Path, *, seconds: float, force: bool, json: bool) -> int:
    """`tracetool shrink`."""
    from tracetool import story
    from tracetool.shrink import shrink_finding, write_case

    dataset = open_dataset(request.target, request.options)
    values = request.values()
    chosen = story.find(dataset, finding, values)
    with terminal.progress_bar() as bar:
        case = shrink_finding(dataset, chosen, output.name, values, seconds=seconds, progress=bar)
    scenario, test = write_case(case, output, force=force)
    if json:
        print(jsonlib.dumps({"schema": 1, "scenario": str(scenario), "test": str(test), **case.numbers()}))
    else:
        print(terminal.clean(case.summary()))
        print(terminal.clean(f"  {scenario}\n  {test}").replace("\\n", "\n"))
    return exits.CLEAN


# -- diff ----------------------------------------------------------------------------------------------------------


def diff(request: Request, other: str, *, json: bool, fail_on: str) -> int:
    """`tracetool diff`."""
    from tracetool import difference

    check_severity(fail_on)
    one, two = (_side(path, request) for path in (request.target, other))
    found = difference.compare(one, two)
    print(jsonlib.dumps(found) if json else difference.text(found))
    return difference.exit_code(found, fail_on)


def _side(path: str, request: Request) -> dict[str, Any]:
    """One side of a comparison: runs as stored in JSON, or replayed now."""
    from tracetool import difference

    if path.endswith(".json") and Path(path).is_file():
        stored = difference.stored(Path(path))
        if stored is not None:
            return stored
    if not Path(path).is_dir() and not Path(path).exists():
        raise UsageError(f"{path}: no such file or folder")
    dataset = open_dataset(path, request.options)
    return {"name": path, "runs": replayed(dataset, request.settings()), "unit": dataset.manifest["clock"]["unit"]}
