"""Options that several commands have, declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["FailOn", "Force", "Given", "Json", "Output", "Target", "grouped"]

Json = Annotated[bool, typer.Option("--json", help="Print the documented JSON object on stdout.")]
Target = Annotated[str, typer.Argument(metavar="DATASET|RECORDING", help="A dataset, or a recording to read first.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there already.")]
FailOn = Annotated[str, typer.Option("--fail-on", help="Exit with 1 from this severity on: error, warn, info, never.")]

#: Values of a group of options by name, as the functions of `tracetool.request` take them.
Given = Mapping[str, Any]


def _reading(
    cpu_hz: Annotated[
        str | None, typer.Option("--cpu-hz", help="Stamp frequency, e.g. 2.4G; replaces what is derived.")
    ] = None,
    xen_version: Annotated[
        str | None, typer.Option("--xen-version", help="E.g. 4.17; decides what cannot be told.")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="Read as this format instead of recognising it.")
    ] = None,
    hpet_irqs: Annotated[
        str | None, typer.Option("--hpet-irqs", help="Interrupts of the HPET channels, e.g. 24,25,26.")
    ] = None,
    event_map: Annotated[
        Path | None, typer.Option("--event-map", help="TOML: what events with names of your own show (kprobes).")
    ] = None,
) -> Given:
    """How a recording is read."""
    return {
        "cpu_hz": cpu_hz, "xen_version": xen_version, "format": format, "hpet_irqs": hpet_irqs, "event_map": event_map,
    }  # fmt: skip


def _replaying(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", "-p", help="current, proposed, NAME, SYSTEM=NAME or ./file.py:Class; repeat to compare."
        ),
    ] = None,
    system: Annotated[
        list[str] | None, typer.Option("--system", "-s", help="Only this system; repeat for more.")
    ] = None,
    recorded: Annotated[
        list[str] | None,
        typer.Option("--recorded", help="SYSTEM=POLICY that really ran, where the recording does not tell."),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option("--keep", min=1, help="Findings of each code and severity listed (10000); more are counted."),
    ] = None,
) -> Given:
    """What is replayed."""
    return {
        "policies": tuple(policy or ()), "systems": tuple(system or ()), "recorded": tuple(recorded or ()),
        "keep": keep,
    }  # fmt: skip


def _thresholds(
    set: Annotated[
        list[str] | None, typer.Option("--set", help="A threshold, for instance hpet.slop_ns=50000.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="File with thresholds (default: ./tracetool.toml).")
    ] = None,
) -> Given:
    """Parameters of the models."""
    return {"sets": tuple(set or ()), "config": config}


_GROUPS: Mapping[str, Callable[..., Given]] = {
    "replaying": _replaying, "thresholds": _thresholds, "reading": _reading,
}  # fmt: skip


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of the groups that its parameters name, after its own."""
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [p for name, p in own.items() if name not in _GROUPS]
    groups: dict[str, list[str]] = {}
    for name in (n for n in _GROUPS if n in own):
        shared = inspect.signature(_GROUPS[name], eval_str=True).parameters
        groups[name] = list(shared)
        parameters += shared.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {name: _GROUPS[name](**{n: given.pop(n) for n in names}) for name, names in groups.items()}
        command(**given, **values)

    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in keywords}
    return run
