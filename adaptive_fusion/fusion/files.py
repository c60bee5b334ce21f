"""Tensors and a text header in a safetensors file, written whole or not at all.

Knows files; must not know what the tensors are.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adaptive_fusion.errors import ConfigError


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write the file; a crash leaves the one that was there before.

    Raises:
        OSError: If the folder cannot be written.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    save_file(dict(tensors), partial, metadata=dict(header))
    os.replace(partial, target)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and its header, which is empty where there is none.

    Raises:
        ConfigError: If there is no such file, or it is not a safetensors file.
    """
    name = Path(path).name
    if not Path(path).is_file():
        raise ConfigError(f"file {name!r} does not exist; expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{name} is not a readable safetensors file: {error}") from error
