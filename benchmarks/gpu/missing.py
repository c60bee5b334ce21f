"""Which wheels of a folder a machine needs: those of packages that it lacks, or has older than this project asks for.

    python benchmarks/gpu/missing.py WHEELS

Prints their paths in one line. A wheel of a package that this project does not name itself is taken if the machine has
none or an older one: it was brought for those that it does name. Runs with the standard library alone and ``packaging``
where pip brings it: nothing else may be there yet.
"""

import sys
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def _packaging(part: str) -> Any:
    """A module of ``packaging``, or of the copy that pip carries."""
    try:
        return import_module(f"packaging.{part}")
    except ModuleNotFoundError:
        return import_module(f"pip._vendor.packaging.{part}")


ROOT = Path(__file__).resolve().parents[2]


def missing(folder: Path, project: Path = ROOT / "pyproject.toml") -> list[Path]:
    """The wheels to install, in the order of their names."""
    requirements, utils, versions = (_packaging(part) for part in ("requirements", "utils", "version"))
    asked = [requirements.Requirement(text) for text in tomllib.loads(project.read_text())["project"]["dependencies"]]
    least = {utils.canonicalize_name(requirement.name): requirement.specifier for requirement in asked}
    found = []
    for path in sorted(folder.glob("*.whl")):
        name, offered, *_ = utils.parse_wheel_filename(path.name)
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(path)
            continue
        wanted = least.get(name)
        if wanted is None:
            needed = versions.Version(have) < offered
        else:
            needed = not wanted.contains(have, prereleases=True) and wanted.contains(offered)
        if needed:
            found.append(path)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: missing.py WHEELS; WHEELS is a folder")
    print(" ".join(map(str, missing(Path(sys.argv[1])))))
