"""Where this library keeps what it made for a user: profiles, policies. Knows the environment's names for it."""

from collections.abc import Mapping
from pathlib import Path


def user_cache_dir(environ: Mapping[str, str]) -> Path:
    """The folder for this library's caches: ``XDG_CACHE_HOME``, ``LOCALAPPDATA`` or ``~/.cache``, as set
    in `environ`.
    """
    base = environ.get("XDG_CACHE_HOME") or environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "adaptive_fusion"


def user_policies_dir(environ: Mapping[str, str]) -> Path:
    """Where the user's own policies lie, a folder each; one whose name begins with a dot is being written."""
    return user_cache_dir(environ) / "policies"
