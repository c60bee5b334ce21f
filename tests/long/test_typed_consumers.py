"""A strict type checker over programs that use the library: right ones pass, mistakes are found where they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONSUMERS = Path(__file__).parent / "consumers"
ROOT = CONSUMERS.parents[2]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[int]]:
    """Lines with errors of each consumer, counted from 1."""
    folder = tmp_path_factory.mktemp("checked")
    for path in CONSUMERS.glob("*.py"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    config = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] == len(list(CONSUMERS.glob("*.py"))), done.stderr
    found: dict[str, set[int]] = {path.name: set() for path in CONSUMERS.glob("*.py")}
    for each in told["generalDiagnostics"]:
        found[Path(each["file"]).name].add(each["range"]["start"]["line"] + 1)
    return found


@pytest.mark.parametrize("name", ["right.py", "wrong.py"])
def test_mistakes_are_found_and_nothing_else(name: str, complaints: dict[str, set[int]]) -> None:
    lines = (CONSUMERS / name).read_text(encoding="utf-8").splitlines()
    assert complaints[name] == {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
