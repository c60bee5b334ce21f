"""A finished policy into the user's cache, where ``auto`` finds it: all of it or nothing.

Knows folders. Must not know what a policy's files hold.

The files are copied into a folder whose name begins with a dot, which nobody reads, and written through to the disk;
then the folder gets its name at once. The name ends in a hash of the files, so a new version never lies on top of an
older one; that goes afterwards. Whenever the process dies there is the old version, the new one, or for a moment both,
of which the newer counts.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STALE_S = 86_400.0
"""Age in seconds from which a folder that was being written is nobody's any more."""
_NEW = ".new-"


def install(folder: Path, root: Path, name: str) -> Path:
    """Copy a policy's folder into `root`, in place of earlier versions of that name; returns where it is.

    Args:
        folder: Files of a policy, no folders.
        root: See `user_policies_dir`; made if need be.
        name: Of the policy.

    Raises:
        OSError: If it cannot be written; then what was there is as it was.
    """
    root.mkdir(parents=True, exist_ok=True)
    # Seen before this one is there: of two installed at once each would else remove the other.
    earlier = list(root.iterdir())
    digest = _digest(folder)
    target = root / f"{name}-{digest}"
    if target.is_dir() and _digest(target) != digest:  # in part removed, or changed
        (target / "policy.toml").unlink(missing_ok=True)
        shutil.rmtree(target)
    if target.is_dir():
        os.utime(target / "policy.toml")  # the newest again
    else:
        new = Path(tempfile.mkdtemp(prefix=f"{_NEW}{name}-", dir=root))
        try:
            for file in sorted(folder.iterdir()):
                shutil.copyfile(file, new / file.name)
                _sync(new / file.name)
            new.chmod(0o755)
            _sync(new)
            os.rename(new, target)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        _sync(root)
    _tidy(earlier, name, target)
    return target


def installed(root: Path, name: str) -> list[Path]:
    """Folders of the versions of a policy that are there."""
    return [folder for folder in root.iterdir() if _is_version(folder, name)] if root.is_dir() else []


def _is_version(folder: Path, name: str) -> bool:
    version = folder.name.removeprefix(f"{name}-")
    return folder.name == f"{name}-{version}" and len(version) == 8


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(f"{file.name}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:8]


def _sync(path: Path) -> None:
    """What was written to a file or a folder is on the disk; a system that cannot open folders writes them itself."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tidy(before: Sequence[Path], name: str, kept: Path) -> None:
    """Of the folders that were there before, remove earlier versions and what earlier runs left unfinished."""
    for folder in before:
        earlier = _is_version(folder, name) and folder != kept
        unfinished = folder.name.startswith(_NEW) and _age_s(folder) > STALE_S
        if earlier or unfinished:
            # Its policy.toml first: without it nobody takes what is left for a policy.
            (folder / "policy.toml").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _age_s(folder: Path) -> float:
    """Since it was changed; 0 for one that another process has removed or renamed meanwhile."""
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
