"""The command line. Heavy imports happen inside the commands: `--help` needs none of them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracetool import __version__, exits, terminal
from tracetool.options import FailOn, Force, Given, Json, Output, Target, grouped

if TYPE_CHECKING:
    from tracetool.request import Request

__all__ = ["app", "run"]

#: Exit code after ctrl-C, as shells have it.
INTERRUPTED = 130

app = typer.Typer(
    name="tracetool",
    help="Find the lost interrupt in a Xen, KVM or Linux recording by replaying it through reference models.",
    epilog="First steps:  tracetool replay RECORDING   then   tracetool report DATASET -o report.html",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _request(target: str, reading: Given, thresholds: Given, replaying: Given | None = None) -> Request:
    from tracetool.request import Request, ingest_options

    return Request(target, **(replaying or {}), **thresholds, options=ingest_options(**reading))


# -- commands ------------------------------------------------------------------------------------------------------


def _version(value: bool) -> None:
    if value:
        from replay.compiled import is_compiled

        print(f"tracetool {__version__} (machines: {'compiled' if is_compiled() else 'interpreted'})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example:  tracetool ingest boot.xentrace.zst -o boot.dataset")
@grouped
def ingest(
    recordings: Annotated[
        list[str],
        typer.Argument(metavar="RECORDING...", help="Files, compressed or not; - is stdin. Several: of one machine."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new dataset.")],
    reading: Given,
    json: Json = False,
    force: Force = False,
    offset: Annotated[
        list[str] | None,
        typer.Option("--offset", help="NAME=TICKS or NAME=12.5ms: add to that recording's stamps when merging."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="EVENT[,EVENT...]: keep only these; rules that need others are blind."),
    ] = None,
) -> None:
    """Read recordings into a dataset of Arrow tables, losing nothing."""
    from tracetool import commands
    from tracetool.request import ingest_options

    options = ingest_options(**reading, force=force, offsets=offset or (), only=only or ())
    raise typer.Exit(commands.ingest(recordings, output, options, json=json))


@app.command(epilog="Example:  tracetool info boot.dataset")
@grouped
def info(
    target: Target,
    reading: Given,
    json: Json = False,
    budget: Annotated[
        bool, typer.Option("--budget", help="Where the time goes from timer deadline to the guest's handler.")
    ] = False,
) -> None:
    """Say what was recorded, how well, and which systems can be checked."""
    from tracetool import commands
    from tracetool.request import ingest_options

    raise typer.Exit(commands.info(target, ingest_options(**reading), json=json, budget=budget))


@app.command(epilog="Example:  tracetool replay boot.xentrace.zst --policy current --policy proposed")
@grouped
def replay(
    target: Annotated[str, typer.Argument(metavar="DATASET|RECORDING|SCENARIO.json", help="What to replay.")],
    replaying: Given,
    thresholds: Given,
    reading: Given,
    json: Json = False,
    fail_on: FailOn = "error",
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes, one system each (default: cores, if large).")
    ] = None,
) -> None:
    """Replay through the reference models and say where recording and model part."""
    from tracetool import commands

    request = _request(target, reading, thresholds, {**replaying, "jobs": jobs})
    raise typer.Exit(commands.replay(request, json=json, fail_on=fail_on))


@app.command(
    epilog="Examples:  tracetool report boot.dataset -o report.html   tracetool report boot.xentrace --bundle boot.zip"
)
@grouped
def report(
    target: Target,
    replaying: Given,
    thresholds: Given,
    reading: Given,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="report.html, .txt, .md, .json or .xml (JUnit).")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="OUT.zip: the report in each form, and the records of each finding's window."),
    ] = None,
    json: Json = False,
    fail_on: FailOn = "never",
) -> None:
    """Write the report that people attach to a bug."""
    from tracetool import commands

    chosen = {**replaying, "policies": replaying["policies"] or ("current", "proposed")}
    request = _request(target, reading, thresholds, chosen)
    raise typer.Exit(commands.report(request, output, bundle, json=json, fail_on=fail_on))


@app.command(epilog="Examples:  tracetool explain hpet-wrong-cpu   tracetool explain boot.dataset hpet:current:3")
@grouped
def explain(
    target: Annotated[str, typer.Argument(metavar="CODE|DATASET|RECORDING", help="A code, or where the finding is.")],
    replaying: Given,
    thresholds: Given,
    reading: Given,
    finding: Annotated[
        str | None,
        typer.Argument(metavar="[FINDING]", help="system:policy:episode, or a code; without it: list all."),
    ] = None,
    show_python: Annotated[
        bool, typer.Option("--show-python", help="Print the polars lines that show the finding's evidence.")
    ] = False,
    json: Json = False,
) -> None:
    """Explain a code, or tell the story of one finding."""
    from tracetool import commands_more

    request = _request(target, reading, thresholds, replaying)
    raise typer.Exit(commands_more.explain(request, finding, json=json, show_python=show_python))


@app.command(epilog="Example:  tracetool query boot.dataset 'SELECT kind, count(*) FROM events GROUP BY kind'")
@grouped
def query(
    target: Target,
    replaying: Given,
    thresholds: Given,
    sql: Annotated[
        str | None, typer.Argument(metavar="[SQL]", help="A query; without it the tables are listed.")
    ] = None,
    table: Annotated[str | None, typer.Option("--table", "-t", help="List the columns of this table.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write there instead of stdout.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="csv, json, parquet or arrow.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", help="Rows at most (stdout: 100; file: all).")] = None,
    json: Json = False,
) -> None:
    """Ask with SQL: record tables, events, gaps, notes, findings."""
    from tracetool import commands_more

    request = _request(target, {}, thresholds, replaying)
    raise typer.Exit(
        commands_more.query(request, sql, table=table, output=output, format=format, limit=limit, json=json)
    )


@app.command(epilog="Example:  tracetool export boot.dataset --perfetto -o boot.pftrace")
@grouped
def export(
    target: Target,
    output: Output,
    replaying: Given,
    thresholds: Given,
    reading: Given,
    perfetto: Annotated[bool, typer.Option("--perfetto", help="As a Perfetto trace (the default).")] = True,
    start: Annotated[float | None, typer.Option("--from", help="Seconds since the start of the recording.")] = None,
    end: Annotated[float | None, typer.Option("--to", help="Seconds since the start of the recording.")] = None,
    json: Json = False,
) -> None:
    """Export as a Perfetto trace: CPUs, vCPUs, interrupts, findings."""
    from tracetool import commands_more

    raise typer.Exit(
        commands_more.export(_request(target, reading, thresholds, replaying), output, start=start, end=end, json=json)
    )


@app.command(epilog="Example:  tracetool shrink boot.dataset hpet:current:3 -o wrong-cpu")
@grouped
def shrink(
    target: Target,
    finding: Annotated[str, typer.Argument(metavar="FINDING", help="system:policy:episode, or a code.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="NAME: writes NAME.json and test_NAME.py.")],
    thresholds: Given,
    reading: Given,
    seconds: Annotated[float, typer.Option("--seconds", help="Stop looking for a smaller one after this.")] = 30.0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Cut a finding down to the few events that show it, with a test."""
    from tracetool import commands_more

    request = _request(target, reading, thresholds)
    raise typer.Exit(commands_more.shrink(request, finding, output, seconds=seconds, force=force, json=json))


@app.command(epilog="Example:  tracetool diff before.dataset after.dataset --fail-on warn")
@grouped
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="Before: dataset, recording, or JSON of replay or report.")],
    two: Annotated[str, typer.Argument(metavar="B", help="After.")],
    replaying: Given,
    thresholds: Given,
    reading: Given,
    json: Json = False,
    fail_on: FailOn = "error",
) -> None:
    """Compare two recordings or runs: findings new and gone, numbers."""
    from tracetool import commands_more

    raise typer.Exit(commands_more.diff(_request(one, reading, thresholds, replaying), two, json=json, fail_on=fail_on))


@app.command(epilog="Example:  tracetool fleet recordings/ --policy current --policy proposed -o fleet.results")
@grouped
def fleet(
    recordings: Annotated[
        list[str],
        typer.Argument(metavar="DIR|GLOB|FILE...", help="Folders with all below, quoted patterns (** too), files."),
    ],
    replaying: Given,
    thresholds: Given,
    reading: Given,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results; a second call does what is missing.")
    ],
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Worker processes (default: one a CPU).")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="dask://HOST:PORT: a cluster that shares the file system.")
    ] = None,
    version_from: Annotated[
        str | None, typer.Option("--version-from", help="Version in the path: a pattern such as 'build-([^/]+)'.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write a JUnit file too.")] = None,
    json: Json = False,
    fail_on: FailOn = "error",
) -> None:
    """Replay many recordings; a table of what is found, where, since when."""
    from tracetool.fleet.command import fleet as run_fleet
    from tracetool.fleet.plan import Job

    request = _request("", reading, thresholds, replaying)
    policies = request.policies or ("current",)
    job = Job(
        policies, request.systems, request.values(), request.options, version_from, request.recorded,
        request.settings().keep,
    )  # fmt: skip
    code = run_fleet(
        recordings, output, job, jobs=jobs, engine=engine, json=json, junit_file=junit, fail_on=fail_on
    )
    raise typer.Exit(code)


@app.command(epilog="Example:  tracetool recipe evtchn --on linux")
def recipe(
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="hpet, callback, vgic, irqflow, evtchn, apic, gic.")],
    on: Annotated[str | None, typer.Option("--on", help="xen, linux, kvm or qemu.")] = None,
    json: Json = False,
) -> None:
    """Print the exact commands that record what a system's rules need."""
    from tracetool import commands

    raise typer.Exit(commands.recipe(system, on, json=json))


@app.command(epilog="Examples:  tracetool selftest   tracetool selftest --all")
def selftest(
    scenarios: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Scenarios to run (default: those shipped with the tool).")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also hold every rule against the seeded bugs, and print the table.")
    ] = False,
    json: Json = False,
) -> None:
    """Run the conformance scenarios under every policy they list."""
    from tracetool import commands

    raise typer.Exit(commands.selftest(scenarios, everything=everything, json=json))


def run(arguments: Sequence[str], *, debug: bool = False) -> int:
    """Run a command line; returns the exit code. Whatever goes wrong is one line on stderr."""
    try:
        result = app(list(arguments), standalone_mode=False)
    except KeyboardInterrupt:
        result = INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return exits.CLEAN
    except Exception as error:  # the one place where exceptions end
        if debug:
            traceback.print_exc()
        code = getattr(error, "exit_code", None)
        if isinstance(code, int):
            if str(error) or hasattr(error, "format_message"):
                message = error.format_message() if hasattr(error, "format_message") else str(error)
                if message:
                    terminal.error(message)
            return code
        text, status = exits.describe(error)
        terminal.error(text)
        return status
    if result == INTERRUPTED:  # typer catches the exception itself and gives this code
        terminal.error("interrupted; nothing half-written was left")
    return result if isinstance(result, int) else exits.CLEAN
