"""Thresholds from `--set system.name=value` and from `tracetool.toml`, checked against the declarations."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from replay.declare import UsageError
from replay.systems import SYSTEMS

__all__ = ["CONFIG_FILE", "load_event_map", "load_values"]

CONFIG_FILE: Final = "tracetool.toml"


def load_values(assignments: Sequence[str], config: Path | None = None) -> dict[str, dict[str, Any]]:
    """Parameter values by system: the file first (`config`, or ./tracetool.toml if it exists), then `--set`."""
    values: dict[str, dict[str, Any]] = {}
    path = config or Path(CONFIG_FILE)
    if config is not None or path.is_file():
        for system, given in _file(path).items():
            for name, value in given.items():
                _put(values, system, name, value, str(path))
    for text in assignments:
        left, equals, right = text.partition("=")
        system, dot, name = left.partition(".")
        if not equals or not dot:
            raise UsageError(f"--set wants system.name=value, for instance hpet.slop_ns=50000, not {text!r}")
        _put(values, system, name, right, "--set")
    return values


def _file(path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file: byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if not all(isinstance(v, dict) for v in data.values()):
        raise UsageError(f"{path}: expected tables such as [hpet] with name = value")
    return data


def load_event_map(path: Path | None) -> dict[str, dict[str, Any]]:
    """The event map in a TOML file (see replay.binding.linux_probes); empty without a file."""
    if path is None:
        return {}
    from replay.binding.linux_probes import check_event_map

    return check_event_map(_file(path), str(path))


def _put(values: dict[str, dict[str, Any]], system: str, name: str, value: Any, origin: str) -> None:
    if system not in SYSTEMS:
        raise UsageError(f"{origin}: no system {system!r}; there are {', '.join(SYSTEMS)}")
    declared = {p.name: p for p in SYSTEMS[system].parameters}
    if name not in declared:
        raise UsageError(f"{origin}: {system} has no parameter {name!r}; it has {', '.join(declared)}")
    if isinstance(declared[name].default, int) and not isinstance(value, int):
        try:
            value = int(str(value), 0)
        except ValueError:
            raise UsageError(f"{origin}: {system}.{name} must be a whole number, not {value!r}") from None
    values.setdefault(system, {})[name] = value
