"""Assignment: the same key gets the same arm everywhere and always, and a share that rises takes nobody away."""

import os
import subprocess
import sys

import pytest
from arms_table import PLACES, differing, interpreters, run
from arms_table import __file__ as TABLE
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.assignment import CANARY, CONTROL, arm_of, place

SHARES = st.floats(0, 1)


@pytest.mark.parametrize(("fields", "expected"), PLACES.items())
def test_fixed_cases(fields: tuple[str, str], expected: str) -> None:
    assert place(*fields).hex() == expected


def test_the_table_holds_in_every_version_of_python_here_with_nothing_installed() -> None:
    assert differing() == []
    others = {version: python for version, python in interpreters().items() if version != sys.version_info[:2]}
    if not others:
        pytest.skip("no other Python of 3.11 or later is installed")
    for version, python in others.items():
        done = run(python, TABLE)
        assert done.returncode == 0, (version, done.stdout, done.stderr)


def test_another_process_with_another_hash_seed_gives_the_same_arms() -> None:
    code = (
        "from adaptive_fusion.rollout.assignment import arm_of;"
        "print(''.join(arm_of('salt', f'user-{i}', .3)[1] for i in range(200)))"
    )
    here = "".join(arm_of("salt", f"user-{i}", 0.3)[1] for i in range(200))
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == here


@given(st.text(), st.text(), SHARES, SHARES)
def test_a_higher_share_only_adds_units(salt: str, unit: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert arm_of(salt, unit, low) == CONTROL or arm_of(salt, unit, high) == CANARY
    assert arm_of(salt, unit, 0.0) == CONTROL and arm_of(salt, unit, 1.0) == CANARY


@given(st.text(), st.text(min_size=1), st.text())
def test_salt_and_unit_do_not_run_together(salt: str, moved: str, unit: str) -> None:
    assert place(salt + moved, unit) != place(salt, moved + unit)


def test_places_are_uniform_and_independent_of_the_salt() -> None:
    count = 4000
    one = [place("one", str(i)) for i in range(count)]
    other = [place("other", str(i)) for i in range(count)]
    for share in (0.01, 0.05, 0.25, 0.5):
        spread = 4 * (share * (1 - share) / count) ** 0.5
        assert abs(sum(x < share for x in one) / count - share) < spread
    both = sum(a < 0.5 and b < 0.5 for a, b in zip(one, other, strict=True))
    assert abs(both / count - 0.25) < 0.03


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "0.5"])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
        arm_of("salt", "unit", share)
