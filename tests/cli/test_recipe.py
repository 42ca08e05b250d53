"""`tracetool recipe`: commands for every system, probes that were tried, errors in a line."""

from __future__ import annotations

import pytest

from parsers.xentrace.events_instrumented import GROUPS, POINTS
from replay.declare import UsageError
from replay.systems import SYSTEMS
from tracetool.recipe import ELSEWHERE, PLATFORMS, RECIPES, probes, recipe_document, recipe_text


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_every_system_has_a_recipe(system: str) -> None:
    document = recipe_document(system, None)
    assert document["recipes"]
    assert all(r["commands"] for r in document["recipes"])
    text = recipe_text(system, None)
    assert all(command in text for r in document["recipes"] for command in r["commands"])


def test_probes_are_those_that_were_tried() -> None:
    known = probes()
    for recipe in RECIPES:
        for probe in recipe.probes:
            assert known[probe][1], probe


def test_the_groups_of_the_probes_are_recorded() -> None:
    """A probe is an event of the group in its own line: `-e kprobes` would record none of these."""
    known = probes()
    for recipe in RECIPES:
        if recipe.probes:
            assert any("kprobe_events" in command for command in recipe.commands), recipe
            for probe in recipe.probes:
                group = known[probe][0].split()[0].partition(":")[2].partition("/")[0]
                assert any(f" -e {group} " in command for command in recipe.commands), probe


def test_every_platform_is_answered() -> None:
    """Either commands, or why there are none and where there are."""
    for system in SYSTEMS:
        for platform in PLATFORMS:
            has = any((r.system, r.platform) == (system, platform) for r in RECIPES)
            assert has != ((system, platform) in ELSEWHERE), (system, platform)
            if has:
                assert recipe_document(system, platform)["recipes"][0]["commands"]
            else:
                with pytest.raises(UsageError, match=r"cannot be recorded on .* it can on"):
                    recipe_text(system, platform)


def test_instrumented_groups_are_those_of_the_layout() -> None:
    """And the event mask lets all ids of their points pass."""
    points = {group.name: [p.event.ids[0] for p in POINTS if p.group == group.name] for group in GROUPS}
    mask = 0x018AF000
    for recipe in RECIPES:
        assert (recipe.platform == "xen") == bool(recipe.groups)
        for name in recipe.groups:
            assert all(number & mask & 0x0FFF0000 and number & mask & 0xF000 for number in points[name]), name
            assert f"groups {', '.join(recipe.groups)}:" in recipe_text(recipe.system, "xen")
    assert hex(mask)[2:] in recipe_text("vgic", "xen")


def test_unknown_names_are_refused() -> None:
    for arguments in (("nonsense", None), ("hpet", "plan9"), ("gic", "xen")):
        with pytest.raises(UsageError):
            recipe_document(*arguments)
