"""What `tracetool replay` and `tracetool explain` show on a terminal, as rich text.

Styles are put beside the words, never into them: nothing that was recorded can control the terminal or become markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich.text import Text

from replay.systems import SYSTEMS
from tracetool.replaying import not_replayed
from tracetool.report import recorded, stories, verdict
from tracetool.report.text import story_lines
from tracetool.report.words import Times, clean, count, lines, number, plural, where
from tracetool.results import fold

__all__ = ["lockstep_lines", "render", "story"]

_STYLE: Final[Mapping[str, str]] = {
    "error": "bold red", "warn": "yellow", "info": "cyan", "findings": "bold red", "clean": "green",
    "inconclusive": "bold magenta", "dim": "dim", "bold": "bold", "blind": "magenta",
}  # fmt: skip
#: Width of a line that is wrapped.
WIDTH: Final = 100

#: Words, or words with a key of _STYLE.
Piece = str | tuple[str, str]


def _line(*pieces: Piece) -> Text:
    """One line of cleaned words."""
    text = Text()
    for piece in pieces:
        words, kind = (piece, "") if isinstance(piece, str) else piece
        text.append(clean(words), style=_STYLE.get(kind, ""))
    return text


def _page(told: Iterable[Text]) -> Text:
    """Lines as one text. Groups of thousands are thin spaces elsewhere; here every space is as wide as another."""
    page = Text("\n").join(told)
    return Text(page.plain.replace("\u202f", " "), spans=page.spans)


def render(
    runs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], *, title: str = "", target: str = "DATASET"
) -> Text:
    """Verdict, then each run: its worth, each code with its first episode, numbers, what nobody could see.

    `title` stands in place of the verdict of a recording (a scenario has none); `target` is what `explain` is given.
    """
    times = recorded.times_of(manifest)
    if title:
        out = [_line(title)]
    else:
        kind = verdict.overall(runs)
        out = [_line((kind, kind), f"  {verdict.headline(runs, times)}")]
    if not runs:
        reasons = (manifest.get("facts") or {}).items()
        out += [_line(f"  {key}: {why}") for key, why in reasons if key in verdict.REASONS and isinstance(why, str)]
    for run in runs:
        out += [_line(), *_run(run, times)]
    others = [f"{name} ({plural(len(rules), 'rule')})" for name, rules in not_replayed(runs, manifest).items()]
    if others and runs and not title:
        out += [_line(), *(_line((x, "dim")) for x in lines(f"not replayed: {', '.join(others)}", WIDTH))]
    named = next((s.id for s in stories.stories(runs, times)[:1]), None)
    if named is not None and not title:
        out += [_line(), _line(("the story of a finding:  ", "dim"), f"tracetool explain {target} {named}")]
    return _page(out)


def _run(run: Mapping[str, Any], times: Times) -> list[Text]:
    found: list[Piece] = []
    for severity, n in verdict.severities(run["findings"]).items():
        found += [", ", (count({severity: n}), severity)]
    if beyond := verdict.unlisted(run):
        found += [f", {number(beyond)} more not listed"]
    judged = (verdict.verdict_words(run), run["verdict"])
    out = [_line((verdict.run_name(run), "bold"), ": ", judged, *(found or [", no findings"]))]
    if run["mode"] != "verify":
        out += map(_line, lines(f"worth: {verdict.worth(run, times)}", WIDTH, indent="    ", first="  "))
    groups: dict[tuple[str, str], list[Sequence[Mapping[str, Any]]]] = {}
    for group in fold(run["findings"]):
        groups.setdefault((group[0]["severity"], group[0]["code"]), []).append(group)
    for episodes in groups.values():
        out += _code(run, episodes, times)
    blind = [r["rule"] for r in run["coverage"] if r["state"] == "blind"]
    if blind:
        head = f"{len(blind)} of {plural(len(run['coverage']), 'rule')} cannot be seen in this recording: "
        out += [_line((x, "blind")) for x in lines(head + ", ".join(blind), WIDTH, indent="    ", first="  ")]
    out += map(_line, lockstep_lines(run["metrics"]))
    plain = {k: v for k, v in run["metrics"].items() if "." not in k}
    metrics = [f"{k}={number(v)}" for k, v in plain.items() if v]
    unseen = {r["rule"] for r in run["coverage"] if r["state"] == "blind"}
    zeros = SYSTEMS[run["system"]].zeros.items() if run["mode"] == "verify" else ()
    none = [k for k, rule in zeros if plain.get(k) == 0 and rule not in unseen]
    if metrics or none:
        words = "  ".join([*metrics, *([f"none: {', '.join(none)}"] if none else [])])
        out += [_line((x, "dim")) for x in lines(words, WIDTH, indent="  ", first="  ")]
    return out


def lockstep_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What the hardware models foresaw of what the emulated hardware did, outcome by outcome; nothing where no such
    comparison was made."""
    names = [k.removeprefix("lockstep.").removesuffix(".observed") for k in metrics if k.endswith(".observed")]
    kinds = ("observed", "predicted", "open", "mismatch")
    rows = [(n, *(metrics.get(f"lockstep.{n}.{kind}", 0) for kind in kinds)) for n in names]
    told = [
        f"    {name}: {number(seen)} seen, {number(foreseen)} foreseen, {number(undecided)} not decidable, "
        f"{plural(wrong, 'mismatch', 'mismatches')}"
        for name, seen, foreseen, undecided, wrong in rows if seen or wrong
    ]  # fmt: skip
    return ["  in lockstep with the hardware of the recording:", *told] if told else []


def _code(run: Mapping[str, Any], episodes: Sequence[Sequence[Mapping[str, Any]]], times: Times) -> list[Text]:
    """All episodes of one code and severity, told by the first."""
    first = episodes[0][0]
    total = sum(len(group) for group in episodes)
    name = f"{first['code']} on {where(first, run['system'])}"
    if total > 1:
        name += f", {number(total)} times"
    if len(episodes) > 1:
        name += f" in {plural(len(episodes), 'episode')}"
    when = f"at {times.at(first['t_ns'])}"
    if first["offset"] is not None:
        when += f", offset {first['offset']:#x}"
    severity = first["severity"]
    expected = f"(expected: {first['expected']})" if first["expected"] else ""
    return [
        _line("  ", (severity.ljust(5), severity), f" {name}  ", (verdict.finding_id(run, first), "dim")),
        _line(f"        {first['observed'] or 'not stated'} ", (expected, "dim")),
        _line((f"        {when}, confidence {first['confidence']}", "dim")),
    ]


def story(item: stories.Story, times: Times, *, width: int = WIDTH) -> Text:
    """One episode for `explain`."""
    head, *rest = story_lines(item, times, width)
    return _page([_line((head, item.severity)), *map(_line, rest)])
