"""Assignment: the same key gets the same arm everywhere and always, and a share that rises takes nobody away."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.assignment import CANARY, CONTROL, arm_of, place

PLACES = {
    # A table for other versions and other languages: BLAKE2b of 8 bytes, personalised "arm-of-a-unit", over
    # "<bytes>:<salt><bytes>:<unit>"; the first 53 bits over 2**53.
    ("", ""): "0x1.cefab75c1513cp-3",
    ("salt", ""): "0x1.c855548f29294p-2",
    ("", "unit"): "0x1.86b1414a7d950p-4",
    ("salt", "user-1"): "0x1.ab8493953c334p-3",
    ("salt", "user-2"): "0x1.f87bd651adc4cp-2",
    ("general-balanced-20260101-000000", "3f2a"): "0x1.b41ace58c7ee8p-3",
    ("s\u00e4lt", "\u7528\u6237"): "0x1.5a419278eaf68p-3",
    ("a", 1000 * "b"): "0x1.3d85fc0f5aba1p-1",
    ("1:a", "1:b"): "0x1.d7d4f9e6b306dp-1",
}
SHARES = st.floats(0, 1)


@pytest.mark.parametrize(("fields", "expected"), PLACES.items())
def test_fixed_cases(fields: tuple[str, str], expected: str) -> None:
    assert place(*fields).hex() == expected


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
