"""`tracetool recipe`: commands for every system, probes that were tried, errors in a line."""

from __future__ import annotations

import pytest

from replay.declare import UsageError
from replay.systems import SYSTEMS
from tracetool.recipe import RECIPES, probes, recipe_document, recipe_text


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


def test_unknown_names_are_refused() -> None:
    for arguments in (("nonsense", None), ("hpet", "plan9"), ("gic", "xen")):
        with pytest.raises(UsageError):
            recipe_document(*arguments)
