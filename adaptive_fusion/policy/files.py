"""A policy's files, read without trusting them, and where the shipped policies lie.

Knows paths, sizes and text formats. Must not know what the files mean. Nothing here runs code from a file,
except `load_pickled`, which the caller has to ask for by name. Messages carry file names, never whole paths.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import PolicyError

POLICY_FILE = "policy.toml"
AUTO = "auto"
"""In place of a policy's name: the one that was fitted to the model at hand."""
MAX_FILE_BYTES = 64 << 20

_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def shipped_root() -> Path:
    """The folder of the shipped policies: inside the installed package, else beside it in a checkout.

    Raises:
        PolicyError: If neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "policies", package.parent / "policies"):
        if root.is_dir():
            return root
    raise PolicyError("the shipped policies are missing; expected a folder policies in or beside the package")


def shipped_names() -> tuple[str, ...]:
    """Names of the shipped policies, sorted."""
    return tuple(sorted(path.parent.name for path in shipped_root().glob(f"*/{POLICY_FILE}")))


def find_policy(name_or_path: str | Path) -> Path:
    """The ``policy.toml`` or ``.json`` file that a shipped name or a path stands for.

    Raises:
        PolicyError: If there is none; names the choices.
    """
    if name_or_path == AUTO:
        raise PolicyError(
            f"policy is {AUTO!r}, which a model decides: AdaptiveRunner(model, processor) chooses by it; expected a "
            f"path or one of {', '.join(shipped_names())}"
        )
    if isinstance(name_or_path, str) and name_or_path in shipped_names():
        return shipped_root() / name_or_path / POLICY_FILE
    if not isinstance(name_or_path, str | Path):
        raise PolicyError(f"policy is {name_or_path!r}; expected a path or one of {', '.join(shipped_names())}")
    path = Path(name_or_path)
    try:
        if path.is_dir():
            if not (path / POLICY_FILE).is_file():
                raise PolicyError(f"folder {path.name!r} holds no {POLICY_FILE}; expected a policy's folder")
            return path / POLICY_FILE
        if path.is_file() and path.suffix in (".toml", ".json"):
            return path
    except OSError:
        pass  # a name too long for the file system: no policy either
    raise PolicyError(
        f"unknown policy {path.name[:100]!r}; expected one of {', '.join(shipped_names())}, or the path of a "
        f"folder with {POLICY_FILE}, of a .toml file or of a vision_tower .json file"
    )


def part(folder: Path, name: Any, *suffixes: str) -> Path:
    """A file of the policy's own folder: a plain name, of an expected kind, there, not a link elsewhere.

    Raises:
        PolicyError: If it is anything else.
    """
    kinds = " or ".join(suffixes)
    if not isinstance(name, str) or not _PART.fullmatch(name) or not name.endswith(suffixes):
        raise PolicyError(f"the policy names the file {name!r}; expected a plain name ending in {kinds}")
    path = folder / name
    if not path.is_file():
        raise PolicyError(f"the policy names the file {name!r}, which is not in its folder; expected a {kinds} file")
    if path.resolve().parent != folder.resolve():
        raise PolicyError(f"the policy's file {name!r} is a link out of its folder; expected the file itself")
    return path


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's table; raises PolicyError if it is not one."""
    try:
        return tomllib.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # also a plain ValueError, for a number of too many digits
        raise PolicyError(f"{path.name} is not TOML: {error}") from error


def read_json(path: Path) -> Any:
    """A JSON file's value; raises PolicyError if it is not JSON (NaN and infinities are not)."""

    def refuse(constant: str) -> float:
        raise json.JSONDecodeError(f"{constant} is not a JSON number", constant, 0)

    text = _read_text(path)
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # also a plain ValueError, for a number of too many digits
        raise PolicyError(f"{path.name} is not JSON: {error}") from error


def write_json(path: Path, values: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write JSON that `read_json` reads back to the same numbers; without `indent` on one line, for many of them."""
    path.write_text(json.dumps(values, indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def load_pickled(path: Path, allow_pickle: bool) -> Any:
    """A ``.joblib`` file's object, only if `allow_pickle`: unpickling runs whatever code the file holds.

    Raises:
        PolicyError: Without the permission.
    """
    if not allow_pickle:
        raise PolicyError(
            f"{path.name} is pickled, and reading it runs whatever code it holds; expected a .json router, "
            "or allow_pickle=True for a file whose maker is trusted"
        )
    import joblib  # only when asked for: no other path needs it

    return joblib.load(path)


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PolicyError(f"{path.name} has {size} bytes; expected at most {MAX_FILE_BYTES}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path.name} cannot be read as UTF-8 text ({type(error).__name__})") from error
