"""The profile in use: the key it holds for, and its file in the user's cache, or an estimate in its place.

Knows models' configurations and files. Knows nothing of samples, and is not needed to predict. A file that cannot be
used is never an error: it is told why, and an estimate takes its place.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adaptive_fusion.cost.estimate import analytic_profile, device_rates, model_shape
from adaptive_fusion.cost.model import Profile
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.file_lock import write_whole
from adaptive_fusion.models.base import Adapter
from adaptive_fusion.user_cache import user_cache_dir

MAX_BYTES = 1 << 20


def profile_path(cache_dir: Path, key: Mapping[str, str]) -> Path:
    """Where the profile for `key` is kept: one file per key, named by its hash."""
    text = json.dumps(dict(key), sort_keys=True, separators=(",", ":"))
    return Path(cache_dir) / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def save_profile(cache_dir: Path, profile: Profile) -> Path:
    """Write a profile to the cache and return its path; a reader sees the old file or the new one, never
    half of one.

    Raises:
        OSError: If the folder cannot be written.
    """
    return write_whole(profile_path(cache_dir, profile.key), json.dumps(profile.to_dict(), indent=1, allow_nan=False))


def read_profile(path: Path, key: Mapping[str, str]) -> tuple[Profile | None, str]:
    """The profile in a file if it holds for `key`, and a sentence: what was found, or why it was refused."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            return None, f"profile file is larger than {MAX_BYTES} bytes"
        values = json.loads(raw)
        if not isinstance(values, Mapping):
            return None, "profile file holds no table"
        profile = Profile.from_dict(values)
    except FileNotFoundError:
        return None, "no profile of this set-up; run `adaptive-fusion calibrate`"
    except OSError as error:
        return None, f"profile file cannot be read: {error.strerror}"
    except ConfigError as error:
        return None, str(error)
    except (ValueError, RecursionError):
        return None, "profile file is not valid JSON"
    refused = profile.mismatch(key)
    return (None, refused) if refused else (profile, f"profile of {profile.samples} requests")


def load_profile(cache_dir: Path, key: Mapping[str, str]) -> tuple[Profile | None, str]:
    """The cached profile for `key`, or None and the reason; never raises for what a file holds."""
    return read_profile(profile_path(cache_dir, key), key)


def profile_key(adapter: Adapter) -> dict[str, str]:
    """What a profile depends on: model configuration, device, dtype, attention backend and versions."""
    import torch

    model = adapter.model
    config = model.config
    device = adapter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    whole = _without_place(config.to_dict()) if hasattr(config, "to_dict") else repr(config)
    shape = json.dumps(whole, sort_keys=True, default=str)
    return {
        "model": f"{type(model).__name__}-{hashlib.sha256(shape.encode()).hexdigest()[:16]}",
        "device": f"{device.type}:{name}:{torch.get_num_threads() if device.type == 'cpu' else ''}",
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "torch": str(torch.__version__),  # a plain text, which needs no PyTorch to be read
        "transformers": _version("transformers"),
        "adaptive_fusion": _version("adaptive-fusion"),
    }


def _without_place(config: Any) -> Any:
    """A configuration less where its files lie, which is no part of what the model costs."""
    if isinstance(config, Mapping):
        return {str(key): _without_place(value) for key, value in config.items() if key != "_name_or_path"}
    return config


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def find_profile(adapter: Adapter) -> tuple[Profile, str]:
    """The measured profile in the user's cache if it holds here, else an estimate; and a sentence that says which."""
    key = profile_key(adapter)
    profile, note = load_profile(user_cache_dir(os.environ), key)
    if profile is not None:
        return profile, note
    rates = device_rates(str(adapter.device))
    estimate = analytic_profile(model_shape(adapter), key, dtype_bytes=adapter.dtype.itemsize, rates=rates)
    return estimate, f"estimated from the model's shape: {note}"
