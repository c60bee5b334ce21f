"""Which wheels of a folder a machine needs: those of packages that it lacks, or has older than this project asks for.

    python benchmarks/gpu/missing.py WHEELS

Prints their paths in one line. A wheel of a package that this project does not name itself is taken if the machine has
none or an older one: it was brought for those that it does name. Runs with the standard library alone and ``packaging`` where pip brings it: nothing else may be there yet.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename
    from packaging.version import Version
except ModuleNotFoundError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
    from pip._vendor.packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def missing(folder: Path, project: Path = ROOT / "pyproject.toml") -> list[Path]:
    """The wheels to install, in the order of their names."""
    asked = [Requirement(text) for text in tomllib.loads(project.read_text())["project"]["dependencies"]]
    least = {canonicalize_name(requirement.name): requirement.specifier for requirement in asked}
    found = []
    for path in sorted(folder.glob("*.whl")):
        name, offered, *_ = parse_wheel_filename(path.name)
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(path)
            continue
        wanted = least.get(name)
        if wanted is None:
            needed = Version(have) < offered
        else:
            needed = not wanted.contains(have, prereleases=True) and wanted.contains(offered)
        if needed:
            found.append(path)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: missing.py WHEELS; WHEELS is a folder")
    print(" ".join(map(str, missing(Path(sys.argv[1])))))
