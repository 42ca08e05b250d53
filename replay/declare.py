"""What a system declares as data: divergence codes, parameters, rules, policies.

Checks, coverage, `tracetool explain` and the reference pages all read these declarations; nothing about a code is
written a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replay.bodies import Measured, Read
    from replay.machine import Machine
    from replay.sink import Sink

__all__ = ["Code", "Config", "Parameter", "System", "UsageError"]


class UsageError(Exception):
    """The user asked for something that does not exist; `str()` is one line that says what does."""


@dataclass(frozen=True, slots=True)
class Code:
    """One divergence code (spec I.4). Names are kebab-case and stable for ever.

    `needs` are the kinds of events without which the rule is blind; an entry "a|b" is satisfied by either.
    `closed` says whether closed (scenario, what-if) runs raise it at all (spec B).
    """

    name: str
    severity: str  # "error" | "warn" | "info"
    rule: str  # rule ids of the spec
    source: str  # manual section, or Xen/Linux function
    doc: str  # the predicate, in a sentence
    cause: str  # probable cause
    not_when: str = ""
    needs: tuple[str, ...] = ()
    thresholds: tuple[str, ...] = ()  # names of parameters
    closed: bool = True
    #: Kinds of events without which the rule is inferred only, and what it assumes in their place.
    assumes: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A threshold or latency: `--set hpet.slop_ns=…`, `tracetool.toml`, or a scenario's `config`."""

    name: str
    default: Any
    unit: str
    doc: str


class Config:
    """Values of a system's parameters: declared defaults overlaid by what the user or a scenario set."""

    def __init__(self, parameters: Sequence[Parameter], values: Mapping[str, Any] | None = None) -> None:
        self.values: dict[str, Any] = {p.name: p.default for p in parameters}
        self.given: frozenset[str] = frozenset(values or ())
        self.values.update(values or {})

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def integer(self, name: str) -> int:
        """The value as an integer; UsageError when it is none."""
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"{name} must be a whole number, not {value!r}")
        return value


@dataclass(frozen=True, slots=True)
class System:
    """One of the systems that can be replayed.

    `make(policy, config, sink, sub)` builds a machine; `policies` maps a policy name to its class;
    `roles` maps `current`/`proposed` to policy names; `recorded` is the policy a recording is taken to come from.
    """

    name: str
    section: str
    title: str
    codes: tuple[Code, ...]
    parameters: tuple[Parameter, ...]
    policies: Mapping[str, type[Any]]
    roles: Mapping[str, str]
    make: Callable[[Any, Config, Sink, str], Machine]
    kinds: tuple[str, ...]
    recorded: str = "current"
    #: Kinds that are fed in what-if runs; None: stimuli, context and responses of `kinds`.
    stimuli: tuple[str, ...] | None = None
    #: Metrics in which a what-if run of the recorded policy must agree with the recording (spec 0.5).
    calibrate: tuple[str, ...] = ()
    #: Stimuli without which a what-if run is about nothing; an entry "a|b" is satisfied by either.
    drives: tuple[str, ...] = ()
    #: Pre-pass over the events of a recording: latencies, bodies and initial state of its what-if runs (spec 0.6).
    measure: Callable[[Read, Config, frozenset[str]], Measured] | None = None
    #: Kinds of outcomes that the machine's `effects` predict one by one, and how an event becomes such an effect.
    outcomes: tuple[str, ...] = ()
    effect: Callable[[Mapping[str, int]], int] | None = None
    effect_words: Callable[[int], str] = str
    effect_object: Callable[[int], int] = int  # which object it is about, wherever it is served
    effect_fields: Callable[[int], Mapping[str, int]] = lambda what: {}  # cpu, dom, vcpu, obj of a finding about it
    #: Parameters that change a stimulus: they hold in what-if runs, never in the run that is calibrated.
    changes: tuple[str, ...] = ()
    #: Metrics whose zero is worth telling, and the rule that must see something for that.
    zeros: Mapping[str, str] = field(default_factory=dict)
    #: Why a recording without findings is not clean all the same, from the metrics; "": nothing speaks against it.
    doubt: Callable[[Mapping[str, int], Config], str] = lambda metrics, config: ""

    def policy(self, name: str) -> str:
        """The policy's own name for a name or a role; UsageError lists what there is."""
        resolved = self.roles.get(name, name)
        if resolved not in self.policies:
            known = ", ".join(self.policies)
            raise UsageError(f"system {self.name} has no policy {name!r}; it has {known}")
        return resolved
