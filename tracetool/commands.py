"""What the commands do, behind the command line."""

from __future__ import annotations

import json as jsonlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replay.declare import Code, UsageError
from replay.generic import CODES as GENERIC_CODES
from replay.systems import SYSTEMS
from tracetool import describe, exits, terminal
from tracetool.ingest import IngestOptions
from tracetool.ingest import ingest as run_ingest
from tracetool.output import spare_inputs
from tracetool.request import Request, check_severity, exit_code, open_dataset, replayed, say_damage
from tracetool.results import contract, run_record
from tracetool.store import Dataset

__all__ = ["codes", "explain", "info", "ingest", "recipe", "replay", "report", "selftest"]


def ingest(recordings: Sequence[str], output: Path, options: IngestOptions, *, json: bool) -> int:
    """`tracetool ingest`."""
    with terminal.progress_bar() as bar:
        ingested = run_ingest(recordings, output, options, bar)
    say_damage(ingested)
    if json:
        print(jsonlib.dumps(describe.ingest_document(ingested)))
    else:
        print(describe.ingest_text(ingested))
    return exits.UNREADABLE if ingested.damaged else exits.CLEAN


def info(target: str, options: IngestOptions, *, json: bool, budget: bool = False) -> int:
    """`tracetool info`; `budget` follows wakes from the deadline to the guest's handler."""
    dataset = open_dataset(target, options)
    spent = None
    if budget:
        from tracetool.report.tables import wake_budget

        spent = wake_budget(dataset)
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
    check_severity(fail_on)
    if request.target.endswith(".json") and Path(request.target).is_file():
        return _replay_scenario(request, json=json, fail_on=fail_on)
    settings = request.settings()  # what is wrong with them is said before a recording is read
    dataset = open_dataset(request.target, request.options)
    runs = replayed(dataset, settings, request.jobs)
    if json:
        from tracetool.replaying import not_replayed

        print(contract(runs, [c for rules in not_replayed(runs, dataset.manifest).values() for c in rules]))
    else:
        from tracetool.report import console

        terminal.show(console.render(runs, dataset.manifest, target=request.target))
    return exit_code(runs, fail_on, damaged=bool(dataset.manifest.get("damaged")), asked=bool(request.systems))


def _replay_scenario(request: Request, *, json: bool, fail_on: str) -> int:
    from replay.declare import Config
    from replay.scenario import load_scenario, run_scenario
    from tracetool.replaying import choose

    scenario = load_scenario(request.target)
    system = scenario.system
    overrides = request.values().get(system.name, {})
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
        from tracetool.report import console

        terminal.show(console.render(runs, {}, title=f"{scenario.id}: {scenario.title}"))
    return exit_code(runs, fail_on, damaged=False)


def report(request: Request, output: Path | None, bundle: Path | None, *, json: bool, fail_on: str) -> int:
    """`tracetool report`."""
    from tracetool.report.bundle import write_bundle
    from tracetool.report.write import check_suffix, write_report

    check_severity(fail_on)
    for path in filter(None, (output, bundle)):
        check_suffix(path, bundle=path is bundle)
    if output is None and bundle is None:
        raise UsageError("where to? give -o report.html, or --bundle OUT.zip")
    spare_inputs((output, bundle), request.target)
    settings = request.settings()
    dataset = open_dataset(request.target, request.options)
    runs = replayed(dataset, settings)
    command = request.options.command
    sizes = {}
    if output is not None:
        with terminal.progress_bar() as bar:
            sizes[output] = write_report(dataset, runs, output, command=command, progress=bar)
    if bundle is not None:
        near = _near(request.target, dataset)
        with terminal.progress_bar() as bar:
            sizes[bundle] = write_bundle(dataset, runs, bundle, command=command, near=near, progress=bar)
    if json:
        written = {"bundle": str(bundle)} if bundle is not None else {}
        first, size = next(iter(sizes.items()))
        done = {"schema": 1, "output": str(first), "bytes": size, **written, "verdicts": _verdicts(runs)}
        print(jsonlib.dumps(done))
    else:
        for path, size in sizes.items():
            print(f"{terminal.clean(str(path))}  {size / 1e6:.1f} MB")
    if fail_on == "never":
        return exits.CLEAN
    return exit_code(runs, fail_on, damaged=bool(dataset.manifest.get("damaged")), asked=bool(request.systems))


def _near(target: str, dataset: Dataset) -> list[Path]:
    """Files that may be the recordings of a dataset: what was given now, what its ingest was given."""
    try:
        given = shlex.split(str(dataset.manifest.get("command", "")))
    except ValueError:
        given = []
    return [Path(target), *(Path(word) for word in given)]


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
