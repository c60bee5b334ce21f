"""The table of a policy that says when a cheap answer is not trusted."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from adaptive_fusion.errors import PolicyError
from adaptive_fusion.policy.escalation import ANY, GENERAL, UNFITTED, Escalation, Threshold, spares_blanks
from adaptive_fusion.policy.policy import Policy

RULES = Escalation(
    2,
    0.01,
    {
        "weighted6r4@0.5/25%": {"read": Threshold(0.5, 0.9, 120, 0.2, 0.01, 0.3), ANY: Threshold(None, 0.6, 300, 0.04)},
        ANY: {"count": Threshold(0.7)},
    },
)


def test_the_nearest_threshold_holds() -> None:
    rung = "weighted6r4@0.5/25%"
    assert RULES.threshold(rung, "read").threshold == 0.5 and RULES.threshold(rung, "read").learned
    assert RULES.threshold(rung, "count").threshold is None  # off for this rung, whatever is said in general
    assert RULES.threshold("native@0.5", "count").threshold == 0.7
    assert RULES.threshold("native@0.5", "read") is GENERAL is Escalation().threshold("a", "")


def test_the_first_step_of_a_kind_is_its_own_else_that_of_every_kind() -> None:
    found = Escalation.from_dict({"first": {"weighted": {"read": "", ANY: "native@0.5"}, "gated": {"read": "native"}}})
    assert Escalation.from_dict(found.to_dict()) == found
    asked = [("weighted", "read"), ("weighted", "count"), ("gated", "read"), ("gated", "count"), ("video", "read")]
    assert [found.first_of(*each) for each in asked] == ["", "native@0.5", "native", None, None]


def test_all_rungs_that_spare_blank_parts_alone_may_have_one_threshold() -> None:
    table = {"*blank": {ANY: 1.0}, ANY: {"read": 0.2}, "gated3@1/4blank": {"read": 0.4}}
    found = Escalation.from_dict({"thresholds": table})
    assert Escalation.from_dict(found.to_dict()) == found
    for rung in ("native@1/2blank", "weighted12r4@1/2blank"):
        assert found.threshold(rung, "read").threshold == 1.0
    assert found.threshold("gated3@1/4blank", "read").threshold == 0.4  # its own
    for rung in ("native@1", "native@1/2blank/50%", "native@0.5/2blank", "native@1/2blank/1fps", "no rung", ""):
        assert not spares_blanks(rung) and found.threshold(rung, "read").threshold == 0.2


def test_what_holds_where_nothing_was_learned_survives_a_file(tmp_path: Path) -> None:
    assert Escalation.from_dict(UNFITTED.to_dict()) == UNFITTED
    kept = Policy.load(replace(Policy.load("balanced"), escalation=UNFITTED).save(tmp_path / "own"))
    assert kept.escalation == UNFITTED


def test_a_policy_keeps_the_table_on_disk_and_has_none_by_itself(tmp_path: Path) -> None:
    plain = Policy.load("native")
    assert plain.escalation is None and Policy.load(plain.save(tmp_path / "plain")).escalation is None
    assert Policy.load(replace(plain, escalation=RULES).save(tmp_path / "new")).escalation == RULES
    (file := tmp_path / "new" / "policy.toml").write_text(file.read_text().replace("count", "counted"))
    with pytest.raises(PolicyError, match=r"kind 'counted'; expected one of \*, count, describe"):
        Policy.load(file)


def test_a_number_alone_is_a_threshold() -> None:
    assert Escalation.from_dict({"thresholds": {ANY: {ANY: 0.3}}}).threshold("a", "read") == Threshold(0.3)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"k": 5}, "k of escalation is 5; expected an integer from 1 to 4"),
        ({"always": 1}, "always of escalation is 1; expected true or false"),
        ({"alpha": 0}, "alpha is 0; expected a number above 0, below 1"),
        ({"thresholds": {"a": 1}}, "expected tables by rung and kind"),
        ({"thresholds": {"a": {ANY: {"threshold": -1}}}}, "threshold is -1; expected a number of at least 0"),
        ({"thresholds": {"a": {ANY: {"treshold": 1}}}}, "unknown .'treshold'. keys"),
        ({"thresholds": {"a": {ANY: {"share": 2}}}}, "share is 2; expected a number from 0 to 1"),
    ],
)
def test_what_is_not_one_is_refused(table: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Escalation.from_dict(table)


def test_the_page_shows_a_table_that_is_one() -> None:
    page = (Path(__file__).parents[3] / "docs" / "escalation.md").read_text(encoding="utf-8")
    rules = Escalation.from_dict(tomllib.loads(page.split("```toml")[1].split("```")[0])["escalation"])
    assert rules.threshold("weighted6r4@0.5/25%", "count").threshold is None
    assert rules.threshold("weighted6r4@0.5/25%", "event") == Threshold(0.2) != rules.threshold("other", "event")
