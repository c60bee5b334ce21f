"""A server that others can reach needs a key, and every setting is checked."""

from typing import Any

import pytest

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.serving.settings import Settings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_a_loopback_host_needs_no_key(host: str) -> None:
    assert Settings(host=host).is_local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.3", "example.com", "", "localhost.example.com"])
def test_another_host_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="there is no key"):
        Settings(host=host)
    assert not Settings(host=host, api_key="k").is_local


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "fast"},
        {"port": 65536},
        {"api_key": " "},
        {"api_key": "ключ"},
        {"queue": -1},
        {"max_body_mib": 0},
        {"max_new_tokens": True},
        {"drain_s": float("nan")},
        {"model": ""},
        {"model": "a\nb"},
    ],
)
def test_a_wrong_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong)).replace('model', 'model name')} is"):
        Settings(**wrong)


def test_the_key_is_not_shown() -> None:
    assert "s3cret" not in repr(Settings(api_key="s3cret"))
