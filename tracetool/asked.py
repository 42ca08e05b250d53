"""What a replay is asked to do: policies, the policy that really ran, parameters."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replay.declare import UsageError
from replay.sink import KEEP
from replay.systems import SYSTEMS

__all__ = ["Choice", "Settings", "choose", "choose_recorded"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy as the user named it: for one system only, or for all; `cls` when it is the user's own class, `spec`
    where that can be loaded from."""

    name: str
    system: str | None = None
    cls: type[Any] | None = None
    spec: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a replay was asked to do. `values` is parameter values by system name; `recorded` the policy that really
    ran, by system name, where the user knows it; `keep` findings of each code and severity are listed, the others
    counted."""

    policies: tuple[Choice, ...] = (Choice("current"),)
    systems: tuple[str, ...] = ()
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recorded: Mapping[str, str] = field(default_factory=dict)
    keep: int = KEEP


def choose(spec: str) -> Choice:
    """`current`, `hpet=proposed-keep`, `./mine.py:MyPolicy`; UsageError for anything that does not exist."""
    if ".py:" in spec:
        path, _, name = spec.rpartition(":")
        return _own_policy(Path(path), name)
    system, _, name = spec.rpartition("=")
    if system and system not in SYSTEMS:
        raise UsageError(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
    if system:
        SYSTEMS[system].policy(name)
    elif name not in ("current", "proposed", "any") and not any(name in SYSTEMS[s].policies for s in SYSTEMS):
        known = sorted({p for s in SYSTEMS for p in SYSTEMS[s].policies} | {"current", "proposed"})
        raise UsageError(f"no system has a policy {name!r}; there are {', '.join(known)}")
    return Choice(name, system or None)


def choose_recorded(specs: Iterable[str]) -> dict[str, str]:
    """`--recorded irqflow=edge`: policy by system; UsageError for anything that does not exist."""
    chosen: dict[str, str] = {}
    for spec in specs:
        system, equals, name = spec.partition("=")
        if not equals:
            raise UsageError(f"--recorded wants SYSTEM=POLICY, for instance irqflow=edge, not {spec!r}")
        if system not in SYSTEMS:
            raise UsageError(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
        chosen[system] = SYSTEMS[system].policy(name)
    return chosen


def _own_policy(path: Path, name: str) -> Choice:
    """A class from a file of the user's."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"user_policy_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: whatever it raises is theirs to read
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        raise UsageError(f"{path} has no class {name}")
    system = getattr(cls, "system", None)
    if system not in SYSTEMS:
        raise UsageError(f"{name} must say which system it is for: system = one of {', '.join(SYSTEMS)}")
    return Choice(name, system, cls, f"{path.absolute()}:{name}")
