"""A runner from two names: policy first, then the model, with failures put in plain words.

Knows the runner and the noise that model loading makes on a terminal. Must not know who asks for it.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_fusion.decision_log import DecisionLog
from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.policy import Policy

if TYPE_CHECKING:
    from adaptive_fusion.runner import AdaptiveRunner

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_EXPECTED = "expected reference, a folder in Hugging Face format, or the id of a model on the Hub"


def checked(model: str, policy: str) -> Policy | str:
    """The policy, where both names can be what they are to be; nothing is loaded that takes long.

    Raises:
        PolicyError: For a policy that cannot be loaded.
        ConfigError: For a text that is neither an existing folder nor of the form of a model's name.
    """
    loaded = policy if policy == AUTO else Policy.load(policy)
    if model != "reference" and not (model and _is_dir(Path(model).expanduser())) and not _HUB_ID.fullmatch(model):
        raise ConfigError(f"model is {model[:200]!r}, which is no folder; {_EXPECTED}")
    return loaded


def open_runner(
    model: str,
    policy: str,
    log: Path | None = None,
    options: Mapping[str, Any] | None = None,
    encoder_cache_mb: int = 0,
    explore: float | None = None,
) -> "AdaptiveRunner":
    """Load policy and model, on the accelerator if there is one, or where the `options` of ``from_pretrained`` say.
    What `policy` is to be, ``auto`` leaves to the model.

    Raises:
        PolicyError: For a policy that cannot be loaded; checked before the model is.
        ConfigError: For a model that cannot be found or read. A text that is neither an existing folder nor of
            the form ``name`` or ``owner/name`` is refused without looking anywhere else.
        UnsupportedModelError: For a model that cannot be driven.
    """
    loaded, folder = checked(model, policy), Path(model).expanduser()
    is_folder = bool(model) and _is_dir(folder)
    try:
        import torch
        from safetensors import SafetensorError

        quieten()
        from adaptive_fusion.runner import AdaptiveRunner
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"the model stack cannot be imported ({_first_line(error)}); `adaptive-fusion doctor` says what to do"
        ) from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    source = str(folder) if is_folder and model != "reference" else model
    given = dict(options or {})
    # Loaders that place the weights themselves do not let them be moved.
    device = None if "device_map" in given or "quantization_config" in given else accelerator
    try:
        return AdaptiveRunner.from_pretrained(
            source,
            policy=loaded,
            device=device,
            log=DecisionLog(log) if log is not None else None,
            encoder_cache_mb=encoder_cache_mb,
            explore=explore,
            **given,
        )
    except AdaptiveFusionError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ConfigError(f"model {model[:200]!r} cannot be loaded: {_first_line(error)}; {_EXPECTED}") from error


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def model_options(
    dtype: str | None = None,
    attention: str | None = None,
    quantization: str | None = None,
    device_map: str | None = None,
) -> dict[str, Any]:
    """Options of ``from_pretrained`` from the words of the command line.

    Args:
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        attention: A kernel, by transformers' name.
        quantization: ``8bit`` or ``4bit``.
        device_map: As accelerate takes it.

    Raises:
        ConfigError: For another word.
    """
    found: dict[str, Any] = {}
    if dtype is not None:
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
        found["dtype"] = _DTYPES[dtype]
    if attention is not None:
        found["attn_implementation"] = attention
    if quantization is not None:
        if quantization not in ("8bit", "4bit"):
            raise ConfigError(f"quantization is {quantization!r}; expected 8bit or 4bit")
        from transformers import BitsAndBytesConfig

        found["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{quantization}": True})
    if device_map is not None:
        found["device_map"] = device_map
    return found


def cache_options(cache: str) -> dict[str, Any]:
    """Options of ``generate`` for a kind of cache.

    Args:
        cache: ``dynamic``, ``static`` or ``quantized``.

    Raises:
        ConfigError: If what it needs is missing.
    """
    if cache == "quantized" and (find_spec("optimum") is None or find_spec("optimum.quanto") is None):
        raise ConfigError("cache is quantized, which needs optimum-quanto; expected pip install optimum-quanto")
    return {} if cache == "dynamic" else {"cache_implementation": cache}


def quieten() -> None:
    """Keep transformers' loading bars and notes off the terminal; its errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
