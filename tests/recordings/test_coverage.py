"""What the silence of a system is worth: states of `info` and verdicts where the rules that matter are blind."""

from __future__ import annotations

from replay.coverage import Coverage, Observation, coverage, sight
from replay.declare import Config
from replay.driver import Run
from replay.systems import SYSTEMS
from tracetool.request import exit_code
from tracetool.results import run_record, sight_document, verdict

CALLBACK = SYSTEMS["callback"]


def rules(**kinds: int) -> list[Coverage]:
    observed = {name.replace("_", ".", 1): Observation(conf, "") for name, conf in kinds.items()}
    return coverage(CALLBACK, observed)


def test_one_harmless_rule_is_no_clean_bill() -> None:
    """Stock records of an HVM guest decide via-eoi-unmatched, which is only information."""
    found = rules(via_inject=100, via_eoi=100)
    seen = sight(CALLBACK, found)
    assert (seen.state, seen.checked, seen.inferred, seen.blind) == ("inconclusive", 1, 0, 8)
    assert set(seen.key_blind) == {c.name for c in CALLBACK.codes if c.severity == "error"}
    assert verdict([], found, 0.0, seen) == "inconclusive"
    assert verdict([{"severity": "warn"}], found, 0.0, seen) == "findings"
    text = sight_document(seen)["text"]
    assert text.startswith("nothing found by 1 of 9 rules; the other 8 could not be seen")


def test_with_rules_for_errors_nothing_found_is_clean_as_far_as_seen() -> None:
    found = rules(via_inject=100, via_eoi=100, via_upcall_set=50, via_upcall_clear=80, via_gsi_assert=50)
    seen = sight(CALLBACK, found)
    assert (seen.state, seen.decides) == ("partial", True)
    assert seen.inferred >= 3
    assert verdict([], found, 0.0, seen) == "clean"
    assert verdict([], found, 0.9, seen) == "inconclusive"
    assert "of them inferred" in seen.words() and "3 findings" in seen.words(3)


def test_everything_or_nothing() -> None:
    everything = coverage(CALLBACK, {k: Observation(100, "") for k in CALLBACK.kinds})
    assert sight(CALLBACK, everything).state == "full"
    assert sight(CALLBACK, []).state == "full"  # a scenario
    blind = sight(CALLBACK, rules())
    assert (blind.state, blind.decides) == ("blind", False)
    assert blind.words() == "none of the 9 rules could be seen"


def test_a_hidden_system_that_nobody_asked_for_does_not_hide_the_others() -> None:
    hidden = {"verdict": "inconclusive", "findings": [], "seen": {"state": "inconclusive"}}
    clean = {"verdict": "clean", "findings": [], "seen": {"state": "partial"}}
    gaps = {"verdict": "inconclusive", "findings": [], "seen": {"state": "partial"}}
    assert exit_code([hidden, clean], "error", damaged=False, asked=False) == 0
    assert exit_code([hidden, clean], "error", damaged=False, asked=True) == 4
    assert exit_code([hidden], "error", damaged=False, asked=False) == 4
    assert exit_code([hidden, gaps, clean], "error", damaged=False, asked=False) == 4


def test_samples_that_contradict_the_model_are_no_clean_bill() -> None:
    """A recording without its sends: the sampled words move, and nothing in the model does."""
    system = SYSTEMS["evtchn"]
    config = Config(system.parameters)
    seen_all = coverage(system, {kind: Observation(100, "") for kind in system.kinds})

    def judged(agree: int, disagree: int, mode: str = "verify") -> tuple[str, str, str]:
        metrics = {"samples_agree": agree, "samples_disagree": disagree}
        record = run_record(Run("evtchn", "modern", mode, [], metrics), system, config, seen_all)
        return record["verdict"], record["seen"]["state"], record["seen"]["text"]

    assert judged(95, 5)[:2] == judged(10, 10)[:2] == judged(9, 91, "what-if")[:2] == ("clean", "full")
    verdict_, state, text = judged(94, 6)
    assert (verdict_, state) == ("inconclusive", "inconclusive")
    assert text.startswith("6 of 100 sampled words are not as the model has them: events that move them are missing; ")
