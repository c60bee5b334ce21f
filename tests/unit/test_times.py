"""Moments: every accepted form gives the same seconds, and nothing is taken for something else."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.times import NO_ZONE, UNITS, read_moment

MOMENTS = st.datetimes(datetime(2000, 1, 2), datetime(2099, 12, 30))


@given(moment=MOMENTS, minutes=st.integers(-14 * 60, 14 * 60))
def test_all_forms_of_a_moment_read_alike(moment: datetime, minutes: int) -> None:
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=UTC)
    seconds = moment.timestamp()
    elsewhere = moment.astimezone(timezone(timedelta(minutes=minutes)))
    plain = moment.replace(tzinfo=None)
    for written, form in (
        (elsewhere, "ISO 8601"),
        (elsewhere.isoformat(), "ISO 8601"),
        (plain.isoformat() + "Z", "ISO 8601"),
        (plain.isoformat(" ") + " UTC", "ISO 8601"),
        (plain, NO_ZONE),
        (f" {plain.isoformat(' ')} ", NO_ZONE),
    ):
        assert read_moment(written, "t") == (pytest.approx(seconds, abs=1e-3), form)
    for unit, per_second in UNITS.items():
        count = round(seconds * 1000) * per_second // 1000
        for written in (count, str(count), float(count)):
            found = read_moment(written, "t")
            assert (found.form, found.seconds) == (unit, pytest.approx(seconds, abs=1))


@pytest.mark.parametrize("written", [0, 1, 2.5, "3", "1e3"])
def test_small_numbers_are_seconds_of_a_start_of_their_own(written: Any) -> None:
    assert read_moment(written, "t") == (float(written), "seconds")


@pytest.mark.parametrize(
    "written",
    [
        "", "nan", "inf", "yesterday", "05/01/2024 12:00", "2024-13-01", "-1", -5, "1969-01-01", None, True, [1],
        float("nan"), 10**400, str(10**400), "20240501", "202405011200", "20240501120000", 5e9, 3e13, "1e30",
        "2150-01-01",
    ],
)  # fmt: skip
def test_what_could_be_something_else_is_refused(written: Any) -> None:
    with pytest.raises(ConfigError, match=r"^when is .*; expected seconds, milliseconds, .* or ISO 8601$"):
        read_moment(written, "when")
