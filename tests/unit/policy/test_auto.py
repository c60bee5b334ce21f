"""Which policy a model gets, told from fingerprints and folders alone."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import PolicyError
from adaptive_fusion.policy import LANES, Policy
from adaptive_fusion.policy.auto import NO_USER_POLICY, Chosen, choose
from adaptive_fusion.policy.fitted import Fingerprint, Fitted
from adaptive_fusion.policy.router import constant_router
from adaptive_fusion.policy.rungs import Rung

HERE = Fingerprint(
    "Qwen3VLForConditionalGeneration",
    {"depth": 24, "width": 1024, "taps": [5, 11, 17]},
    {"depth": 28, "width": 2048, "vocab": 151936},
    "0123456789abcdef",
    {"min_pixels": 65_536, "max_pixels": 16_777_216, "patch": 16, "merge": 2},
)
TUNED = replace(HERE, digest="fedcba9876543210")


def policy(name: str, model: Fingerprint | None = HERE) -> Policy:
    lanes = dict.fromkeys(LANES, (Rung.parse("native@1"),))
    return Policy(name, constant_router(), 0.5, lanes, fitted=Fitted(model, ("receipts",)))


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path)}


def own(environ: Mapping[str, str], mine: Policy, written_s: float) -> Path:
    folder = mine.save(Path(environ["XDG_CACHE_HOME"]) / "adaptive_fusion" / "policies" / mine.name)
    os.utime(folder / "policy.toml", (written_s, written_s))
    return folder


def auto(environ: Mapping[str, str], model: Fingerprint = HERE) -> Chosen:
    return choose("auto", model, environ)


def test_of_the_users_own_equal_weights_come_first_and_then_the_newest(environ: dict[str, str]) -> None:
    own(environ, policy("exact"), 1e9)
    assert auto(environ).policy.name == "exact"
    own(environ, policy("tuned", TUNED), 3e9)  # newer, of other weights
    own(environ, policy("other", replace(HERE, text={**HERE.text, "depth": 36})), 4e9)
    own(environ, policy("general", None), 4e9)
    assert auto(environ).policy.name == "exact" and auto(environ).written_s == 1e9
    own(environ, policy("again"), 2e9)
    found = auto(environ)
    assert found.policy.name == "again" and not found.warning and not found.remark
    third = auto(environ, replace(HERE, digest="0" * 16))
    assert third.note.startswith("the user's own, fitted to a model of this shape")
    assert third.policy.name == "tuned" and "other weights of this shape" in third.remark and not third.warning
    assert auto({**environ, NO_USER_POLICY: "0"}).policy.name == "again"
    assert auto({**environ, NO_USER_POLICY: "1"}).policy.name == "balanced"


def test_what_cannot_be_read_is_skipped_and_named(environ: dict[str, str]) -> None:
    kept = own(environ, policy("kept"), 1e9)
    for name, text in (("torn", "schema = 2\nname ="), ("bytes", "\x00"), ("future", "schema = 99\n")):
        (kept.parent / name).mkdir()
        (kept.parent / name / "policy.toml").write_text(text)
    (kept.parent / "folder" / "policy.toml").mkdir(parents=True)
    without = own(environ, policy("without"), 2e9)
    (without / "router.json").unlink()
    found = auto(environ)
    assert found.policy.name == "kept"
    names = ("bytes", "folder", "future", "torn", "without")
    assert all(repr(name) in said for name, said in zip(names, found.skipped, strict=True)), found.skipped
    assert not any(environ["XDG_CACHE_HOME"] in said for said in found.skipped)
    assert all(said in found.warning for said in found.skipped)  # a fallback is never silent


def test_a_model_that_no_policy_was_fitted_to_gets_the_general_one_with_one_warning(environ: dict[str, str]) -> None:
    found = auto(environ)
    assert found.policy == Policy.load("balanced") and found.policy.fitted.is_general
    assert "no policy was fitted to this model" in found.warning and HERE.architecture in found.warning
    assert found.note == found.remark == "no policy was fitted to this model: general balanced"
    named = choose("balanced", HERE, environ)
    assert (named.warning, named.remark, named.note) == ("", "", "given")


def test_a_policy_for_other_weights_does_not_take_the_place_of_one_for_this_very_model(environ: dict[str, str]) -> None:
    reference = Policy.load("reference-balanced").fitted.model
    assert reference is not None
    own(environ, policy("tuned", replace(reference, digest="0" * 16)), 3e9)
    assert auto(environ, reference).policy.name == "reference-balanced"
    own(environ, policy("uncompared", replace(reference, digest="")), 1e9)
    assert auto(environ, reference).policy.name == "uncompared"
    own(environ, policy("mine", reference), 1e9)
    assert auto(environ, reference).policy.name == "mine"


def test_a_shipped_policy_is_for_its_model_alone(environ: dict[str, str]) -> None:
    reference = Policy.load("reference-quality").fitted.model
    assert reference is not None
    assert auto(environ, reference).policy.name == "reference-balanced"
    assert auto(environ, replace(reference, digest="0" * 16)).policy.name == "balanced"
    offloaded = auto(environ, replace(reference, digest="", unread="weights are offloaded"))
    assert offloaded.policy.name == "reference-balanced" and "weights not compared" in offloaded.remark
    assert "weights are offloaded" in offloaded.note and not offloaded.warning
    fewer = auto(environ, replace(reference, processor={**reference.processor, "max_pixels": 65_536}))
    assert fewer.policy.name == "reference-balanced" and "limits of the processor" in fewer.remark
    assert "max_pixels 147456, here 65536" in fewer.note and not fewer.warning


numbers = st.dictionaries(st.sampled_from(["depth", "width", "heads", "mlp", "taps"]), st.integers(1, 64), max_size=4)


@given(vision=numbers, text=numbers, part=st.sampled_from(["vision", "text"]), name=st.sampled_from(["depth", "mlp"]))
def test_any_other_number_of_a_shape_is_a_warning(
    vision: dict[str, Any], text: dict[str, Any], part: str, name: str
) -> None:
    model = Fingerprint("A", vision, text, "00")
    fitted = Fitted(model)
    assert fitted.differences(model) == () and fitted.fits(model)
    shape = getattr(model, part)
    for other in ({**shape, name: 1 + shape.get(name, 0)}, {k: v for k, v in shape.items() if k != name}):
        (found, *more) = fitted.differences(replace(model, **{part: other})) or (None,)
        assert (found is None) == (other == shape) and not more
        if found is not None:
            assert found.weight == "warning" and part in found.what and name in found.detail
            assert choose(policy("p", model), replace(model, **{part: other}), {}).warning
    assert Fingerprint.from_dict(model.to_dict()) == model


def test_auto_is_no_policy_by_itself() -> None:
    with pytest.raises(PolicyError, match=r"'auto', which a model decides.*expected a path or one of balanced"):
        Policy.load("auto")


def test_what_was_not_fitted_to_these_weights_is_doubted(environ: dict[str, str]) -> None:
    exact, other = policy("exact"), policy("other", replace(HERE, text={**HERE.text, "depth": 36}))
    unread = replace(HERE, digest="")
    assert not choose(exact, HERE, environ).doubt and not choose(exact, unread, environ).doubt
    assert "other weights" in choose(exact, TUNED, environ).doubt
    assert "another model" in choose(other, HERE, environ).doubt
    assert "needs" in auto(environ).doubt and "needs" in choose("quality", HERE, environ).doubt
    assert not choose("native", HERE, environ).doubt  # it says nothing of needs
    own(environ, exact, 1e9)
    assert not auto(environ).doubt and "other weights" in auto(environ, TUNED).doubt
