"""Which module may know which, what is banned from every runtime path, and that importing the package does nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adaptive_fusion"

# Each layer may import itself and the layers before it. A folder stands for all modules in it. A module that is not
# listed counts as the last layer: nothing below may import it.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "checks", "point", "budget", "jsonl", "reference"}),
    frozenset({"media", "fusion", "reduction"}),
    frozenset({"features"}),
    frozenset({"decisions", "decision_log", "reply"}),
    frozenset({"policy", "calibration"}),
    frozenset({"models"}),
    frozenset({"cost"}),
    frozenset({"evaluation"}),
    frozenset({"control"}),
    frozenset({"execution"}),
    frozenset({"runner"}),
)
TOP = len(LAYERS)
BEYOND_RUNTIME = ("learning", "bench", "rollout")
"""Never imported by the runtime; commands import them when they run."""
HEAVY = {"sklearn", "joblib", "matplotlib", "duckdb", "pandas", "sacrebleu", "pickle", "dill", "cloudpickle"}
NETWORK = {"requests", "urllib", "httpx", "aiohttp", "http", "socket", "urllib3"}


class Import(NamedTuple):
    module: str
    target: str
    line: int
    lazy: bool


def part(module: str) -> str:
    """The file or folder of the package that a dotted name lies in."""
    return module.split(".")[1] if "." in module else ""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        yield name, path


def imports(name: str, path: Path) -> Iterator[Import]:
    """Every import of a file, in functions too; those under TYPE_CHECKING bind nothing at run time."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import; expected a full name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                known = (ROOT / whole.replace(".", "/")).with_suffix(".py").exists()
                yield Import(name, whole if known else str(node.module), node.lineno, lazy)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


ALL = [found for name, path in modules() for found in imports(name, path)]
RUNTIME = [found for found in ALL if part(found.module) not in BEYOND_RUNTIME]


def layer(module: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if part(module) in names), TOP)


def told(found: list[Import]) -> list[str]:
    return [f"{i.module}:{i.line} imports {i.target}" for i in found]


def test_every_listed_module_exists() -> None:
    there = {part(name) for name, _ in modules()}
    assert {name for names in LAYERS for name in names} <= there


def test_dependencies_run_one_way() -> None:
    wrong = [
        i
        for i in RUNTIME
        if i.target.startswith("adaptive_fusion.")
        and layer(i.target) > layer(i.module)
        and not (i.lazy and part(i.module) == "evaluation")  # until the metrics have moved there
    ]
    assert not told(wrong)


def test_the_runtime_knows_nothing_of_learning() -> None:
    wrong = [
        i
        for i in RUNTIME
        if i.target.startswith("adaptive_fusion.")
        and part(i.target) in BEYOND_RUNTIME
        and not (i.lazy and part(i.module) in ("commands", "evaluation"))
    ]
    assert not told(wrong)


def test_heavy_and_unpickling_modules_are_imported_only_when_asked_for() -> None:
    wrong = [i for i in RUNTIME if i.target.split(".")[0] in HEAVY and not i.lazy]
    assert not told(wrong)


def test_only_serving_touches_the_network() -> None:
    wrong = [i for i in ALL if i.target.split(".")[0] in NETWORK and part(i.module) != "serving"]
    assert not told(wrong)


def calls(path: Path) -> Iterator[tuple[str, ast.Call, str]]:
    """Dotted name, node and enclosing function of every call in a file."""

    def visit(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.Call, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = node.name
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node, inside
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


@pytest.mark.parametrize("folder", ["adaptive_fusion", "training", "benchmarks", "examples"])
def test_nothing_unpickles_or_runs_remote_code(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name, node, inside in calls(path):
            where = f"{path.relative_to(ROOT)}:{node.lineno} calls {name}"
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if keywords.get("trust_remote_code", "False") != "False":
                wrong.append(f"{where} with trust_remote_code={keywords['trust_remote_code']}")
            if name == "torch.load" and keywords.get("weights_only") != "True":
                wrong.append(f"{where} without weights_only=True")
            if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "os.system"):
                wrong.append(where)
            if name == "joblib.load" and inside != "load_pickled":
                wrong.append(f"{where} outside load_pickled, which asks for permission")
    assert not wrong


IMPORT_AUDIT = """
import json, os, sys, typing
before, environ = set(sys.modules), dict(os.environ)
events = []
def audit(event, arguments):
    if event == "open":
        name, mode, _ = arguments
        events.append((event, name if isinstance(name, str) else repr(name), mode))
    elif event.startswith("socket.") or event in ("subprocess.Popen", "os.mkdir", "os.rename", "os.remove"):
        events.append((event, str(arguments), None))
sys.addaudithook(audit)
import adaptive_fusion
seen = list(events)
print(json.dumps({
    "events": seen,
    "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "inside": sorted(name for name in sys.modules if name.startswith("adaptive_fusion.")),
    "environ": environ == dict(os.environ),
    "names": [name for name in dir(adaptive_fusion) if not name.startswith("_")],
    "budget": adaptive_fusion.Budget(latency_ms=5).latency_ms,
    "torch": "torch" in sys.modules,
    "measured": adaptive_fusion.measure_complexity.__name__,
    "policy": adaptive_fusion.Policy.load("native").name,
    "still light": not {"torch", "transformers", "sklearn", "matplotlib"} & set(sys.modules),
}))
"""


def test_importing_the_package_does_nothing() -> None:
    """No file but the package's own source is read, none written, no socket opened, nothing heavy loaded."""
    command = [sys.executable, "-B", "-c", IMPORT_AUDIT]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    seen = json.loads(found.stdout)
    source = str(PACKAGE / "__init__.py"), str(PACKAGE / "__pycache__" / "__init__.")
    assert all(kind == "open" and name.startswith(source) and mode == "r" for kind, name, mode in seen["events"]), seen
    assert seen["loaded"] == ["adaptive_fusion"] and seen["inside"] == []
    assert seen["environ"]
    assert {"AdaptiveRunner", "Budget", "OperatingPoint", "Policy", "measure_complexity"} <= set(seen["names"])
    assert seen["budget"] == 5 and not seen["torch"]
    # Features, policies and routing need neither torch nor transformers.
    assert seen["measured"] == "measure_complexity" and seen["policy"] == "native" and seen["still light"]


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import adaptive_fusion

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adaptive_fusion.nothing  # type: ignore[attr-defined]
