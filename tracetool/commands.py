"""What the commands do, behind the command line."""

from __future__ import annotations

import hashlib
import json as jsonlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replay.declare import Code, UsageError
from replay.generic import CODES as GENERIC_CODES
from replay.systems import SYSTEMS
from tracetool import __version__, describe, exits, terminal
from tracetool.ingest import Ingested, IngestOptions, parse_offset
from tracetool.ingest import ingest as run_ingest
from tracetool.results import SEVERITIES, contract, run_record, worst
from tracetool.settings import load_event_map, load_values
from tracetool.store import Dataset, is_dataset

__all__ = ["Request", "explain", "info", "ingest", "ingest_options", "recipe", "replay", "report", "selftest"]


@dataclass(frozen=True, slots=True)
class Request:
    """A replay as asked for on the command line."""

    target: str
    policies: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    config: Path | None = None
    options: IngestOptions = field(default_factory=IngestOptions)


# -- options -------------------------------------------------------------------------------------------------------


def ingest_options(
    cpu_hz: str | None,
    xen_version: str | None,
    format: str | None,
    hpet_irqs: str | None,
    force: bool,
    offsets: Sequence[str] = (),
    event_map: Path | None = None,
) -> IngestOptions:
    """Checked options; UsageError names the one that is wrong."""
    return IngestOptions(
        cpu_hz=_hz(cpu_hz),
        xen_version=_version(xen_version),
        format=format,
        hpet_irqs=_numbers(hpet_irqs),
        force=force,
        command="tracetool " + " ".join(sys.argv[1:]),
        offsets=tuple(parse_offset(text) for text in offsets),
        event_map=load_event_map(event_map),
    )


def _hz(text: str | None) -> float | None:
    if text is None:
        return None
    scale = {"k": 1e3, "m": 1e6, "g": 1e9}.get(text[-1:].lower(), 1.0)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = 0.0
    if not 1e3 <= value <= 1e11:
        raise UsageError(f"--cpu-hz wants a frequency such as 2400000000 or 2.4G, not {text!r}")
    return value


def _version(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, dot, minor = text.partition(".")
    if not dot or not major.isdigit() or not minor.isdigit():
        raise UsageError(f"--xen-version wants a version such as 4.17, not {text!r}")
    return int(major), int(minor)


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part, 0) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--hpet-irqs wants interrupt numbers such as 24,25,26, not {text!r}") from None


# -- datasets ------------------------------------------------------------------------------------------------------


def _ingest(recordings: Sequence[str], output: Path, options: IngestOptions) -> Ingested:
    with terminal.progress_bar() as bar:
        return run_ingest(recordings, output, options, bar)


def _dataset(target: str, options: IngestOptions) -> Dataset:
    """A dataset, or one made of a recording and kept in the cache by content, options and tool version."""
    path = Path(target)
    if path.is_dir():
        return Dataset.open(path)
    if target != "-" and not path.exists():
        raise UsageError(f"{target}: no such file or folder")
    cached = _cache() / _cache_key(path, options) if target != "-" else _cache() / f"stdin-{os.getpid()}"
    if not is_dataset(cached):
        ingested = _ingest([target], cached, options)
        _say_damage(ingested)
    return Dataset.open(cached)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tracetool"


def _cache_key(path: Path, options: IngestOptions) -> str:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256")
    stated = (
        options.cpu_hz, options.xen_version, options.format, options.hpet_irqs, path.name, __version__,
        sorted(options.event_map.items()),
    )  # fmt: skip
    content.update(repr(stated).encode())
    return content.hexdigest()[:32]


def _say_damage(ingested: Ingested) -> None:
    for note in ingested.notes:
        if note["severity"] == "error":
            terminal.error(f"{note['source']}: offset {note['offset']}: {note['text']}; the rest was kept")


# -- commands ------------------------------------------------------------------------------------------------------


def ingest(recordings: Sequence[str], output: Path, options: IngestOptions, *, json: bool) -> int:
    """`tracetool ingest`."""
    ingested = _ingest(recordings, output, options)
    _say_damage(ingested)
    if json:
        print(jsonlib.dumps(describe.ingest_document(ingested)))
    else:
        print(describe.ingest_text(ingested))
    return exits.UNREADABLE if ingested.damaged else exits.CLEAN


def info(target: str, options: IngestOptions, *, json: bool, budget: bool = False) -> int:
    """`tracetool info`; `budget` follows wakes from the deadline to the guest's handler."""
    dataset = _dataset(target, options)
    spent = describe.wake_budget(dataset) if budget else None
    if json:
        document = describe.info_document(dataset)
        print(jsonlib.dumps(document if spent is None else {**document, "budget": spent}))
    elif spent is None:
        print(describe.info_text(dataset))
    else:
        print("\n".join(describe.wake_budget_text(spent)))
    return exits.CLEAN


def replay(request: Request, *, json: bool, fail_on: str) -> int:
    """`tracetool replay`."""
    _check_severity(fail_on)
    if request.target.endswith(".json") and Path(request.target).is_file():
        return _replay_scenario(request, json=json, fail_on=fail_on)
    dataset, runs = _runs(request)
    if json:
        print(contract(runs))
    else:
        print(describe.runs_text(runs, dataset))
    return _code(runs, request, fail_on, damaged=bool(dataset.manifest.get("damaged")))


def _runs(request: Request) -> tuple[Dataset, list[dict[str, Any]]]:
    from tracetool.replaying import Settings, choose, replay_dataset

    settings = Settings(
        policies=tuple(choose(p) for p in request.policies or ("current",)),
        systems=request.systems,
        values=load_values(request.sets, request.config),
    )
    dataset = _dataset(request.target, request.options)
    with terminal.progress_bar() as bar:
        return dataset, replay_dataset(dataset, settings, bar)


def _replay_scenario(request: Request, *, json: bool, fail_on: str) -> int:
    from replay.declare import Config
    from replay.scenario import load_scenario, run_scenario
    from tracetool.replaying import choose

    scenario = load_scenario(request.target)
    system = scenario.system
    overrides = load_values(request.sets, request.config).get(system.name, {})
    config = Config(system.parameters, {**scenario.config, **overrides})
    choices = [choose(name) for name in request.policies or tuple(scenario.policies) or ("current",)]
    runs = []
    for choice in choices:
        if choice.system not in (None, system.name):
            raise UsageError(f"{scenario.id} is of system {system.name}, {choice.name} of {choice.system}")
        run = run_scenario(scenario, choice.name, overrides=overrides, policy_class=choice.cls)
        runs.append(run_record(run, system, config, ()))
    if json:
        print(contract(runs))
    else:
        print(describe.runs_text(runs, None, title=f"{scenario.id}: {scenario.title}"))
    return _code(runs, request, fail_on, damaged=False)


def _check_severity(fail_on: str) -> None:
    if fail_on not in (*SEVERITIES, "never"):
        raise UsageError(f"--fail-on wants error, warn, info or never, not {fail_on!r}")


def _code(runs: Sequence[dict[str, Any]], request: Request, fail_on: str, *, damaged: bool) -> int:
    """Exit code of a replay: findings first, then damage, then ignorance."""
    found = worst(runs)
    if fail_on != "never" and found is not None and SEVERITIES.index(found) <= SEVERITIES.index(fail_on):
        return exits.FINDINGS
    if damaged:
        return exits.UNREADABLE
    if not runs or any(r["verdict"] == "inconclusive" for r in runs):
        return exits.INCONCLUSIVE
    return exits.CLEAN


def report(request: Request, output: Path, *, json: bool, fail_on: str) -> int:
    """`tracetool report`."""
    from tracetool.report.write import write_report

    _check_severity(fail_on)
    dataset, runs = _runs(request)
    size = write_report(dataset, runs, output, command=request.options.command)
    if json:
        print(jsonlib.dumps({"schema": 1, "output": str(output), "bytes": size, "verdicts": _verdicts(runs)}))
    else:
        print(f"{output}  {size / 1e6:.1f} MB")
    return _code(runs, request, fail_on, damaged=bool(dataset.manifest.get("damaged"))) if fail_on != "never" else 0


def _verdicts(runs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"system": r["system"], "policy": r["policy"], "verdict": r["verdict"]} for r in runs]


def codes() -> dict[str, tuple[str, Code]]:
    """Every divergence code: (system, declaration) by name."""
    known = {code.name: ("any", code) for code in GENERIC_CODES}
    for name, system in SYSTEMS.items():
        known.update({code.name: (name, code) for code in system.codes})
    return known


def explain(name: str, *, json: bool) -> int:
    """`tracetool explain CODE`."""
    known = codes()
    if name not in known:
        near = [k for k in known if name.split("-")[0] in k]
        raise UsageError(f"no divergence code {name!r}; did you mean one of: {', '.join(near or list(known)[:8])} …?")
    system, code = known[name]
    parameters = {p.name: p for p in SYSTEMS[system].parameters} if system in SYSTEMS else {}
    print(jsonlib.dumps(describe.code_document(system, code)) if json else describe.code_text(system, code, parameters))
    return exits.CLEAN


def recipe(system: str, platform: str | None, *, json: bool) -> int:
    """`tracetool recipe SYSTEM`."""
    from tracetool.recipe import recipe_document, recipe_text

    print(jsonlib.dumps(recipe_document(system, platform)) if json else recipe_text(system, platform))
    return exits.CLEAN


def selftest(folder: Path | None, *, everything: bool = False, json: bool) -> int:
    """`tracetool selftest`; `everything` adds the seeded bugs."""
    from tracetool.selftest import run_all, run_selftest

    results = run_selftest(folder)
    failed = [r for r in results if r["problems"]]
    seeded = run_all(results) if everything else None
    if json:
        document = {"schema": 1, "passed": len(results) - len(failed), "failed": failed}
        if seeded is not None:
            document["seeded"] = seeded
        print(jsonlib.dumps(document))
    else:
        for result in failed:
            print(f"FAIL {result['scenario']} under {result['policy']}: {'; '.join(result['problems'])}")
        count = len({r["scenario"] for r in results})
        print(f"{len(results) - len(failed)} of {len(results)} policy runs of {count} scenarios as specified")
        if seeded is not None:
            from tracetool.seeded.check import summary_text

            print(summary_text(seeded))
    return exits.FINDINGS if failed or (seeded is not None and seeded["problems"]) else exits.CLEAN
