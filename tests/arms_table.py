"""The fixed table of arms: the same keys get the same arms in every version of Python, with nothing installed.

    python tests/arms_table.py            # in this version
    python tests/arms_table.py --all      # in every one of 3.11 and later on PATH, of pyenv and of uv

Needs the standard library alone. Exit code 1 if a version gives another place or arm, or if one has nothing to say.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = {
    # A table for other versions and other languages: BLAKE2b of 8 bytes, personalised "arm-of-a-unit", over
    # "<bytes>:<salt><bytes>:<unit>"; the first 53 bits over 2**53.
    ("", ""): "0x1.cefab75c1513cp-3",
    ("salt", ""): "0x1.c855548f29294p-2",
    ("", "unit"): "0x1.86b1414a7d950p-4",
    ("salt", "user-1"): "0x1.ab8493953c334p-3",
    ("salt", "user-2"): "0x1.f87bd651adc4cp-2",
    ("general-balanced-20260101-000000", "3f2a"): "0x1.b41ace58c7ee8p-3",
    ("s\u00e4lt", "\u7528\u6237"): "0x1.5a419278eaf68p-3",
    ("a", 1000 * "b"): "0x1.3d85fc0f5aba1p-1",
    ("1:a", "1:b"): "0x1.d7d4f9e6b306dp-1",
}
ARMS = "a86ae8ab7d52207081570c2fcfa6175fe11d079bda9691dbe38107920d3235dc"
"""SHA-256 of the first letters but one of the arms of 10,000 users at a share of 0.3."""
OLDEST = (3, 11)


def differing() -> list[str]:
    """What this version has otherwise; nothing."""
    sys.path.insert(0, str(ROOT))
    from adaptive_fusion.rollout.assignment import arm_of, place

    found = {fields: place(*fields).hex() for fields in PLACES}
    said = [
        f"{fields!r}: {found[fields]}, expected {PLACES[fields]}"
        for fields in PLACES
        if found[fields] != PLACES[fields]
    ]
    arms = "".join(arm_of("salt", f"user-{number}", 0.3)[1] for number in range(10_000))
    digest = hashlib.sha256(arms.encode()).hexdigest()
    return said if digest == ARMS else [*said, f"arms of 10,000 users: {digest}, expected {ARMS}"]


def interpreters() -> dict[tuple[int, int], str]:
    """The Pythons of this machine that are not too old, by version."""
    kept = [
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions",
        Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python")),
    ]
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += [each / "bin" for where in kept if where.is_dir() for each in sorted(where.iterdir())]
    found: dict[tuple[int, int], str] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("python3.*"))):
        minor = file.name.removeprefix("python3.").removesuffix(".exe")
        version = (3, int(minor)) if minor.isdigit() else OLDEST
        if minor.isdigit() and version >= OLDEST and version not in found and _runs(file, version):
            found[version] = str(file)
    return found


def _runs(file: Path, version: tuple[int, int]) -> bool:
    """Whether it is what its name says: a shim of a version that is not selected is not."""
    try:
        said = run(str(file), "-c", "import sys; print(*sys.version_info[:2])")
    except (OSError, subprocess.SubprocessError):
        return False
    return said.returncode == 0 and said.stdout.split() == [str(part) for part in version]


def run(python: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Another version, without installed packages and settings, and with hash seeds of its own."""
    command = [python, "-I", "-S", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def main() -> int:
    """Check and say so."""
    if "--all" not in sys.argv[1:]:
        said = differing()
        print("Python {}.{}.{}:".format(*sys.version_info), "; ".join(said) or f"all {len(PLACES)} places, all arms")
        return int(bool(said))
    codes = []
    for _, python in sorted(interpreters().items()):
        done = run(python, str(Path(__file__)))
        print(done.stdout or done.stderr, end="")
        codes.append(done.returncode)
    return int(not codes or any(codes))


if __name__ == "__main__":
    sys.exit(main())
