"""Which module may know which, what is banned from every runtime path, and that importing the package does nothing."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adaptive_fusion"

FLOORS = (
    # From the roof down. A folder, or a module beside the folders, may import what stands after it and nothing else.
    *("cli", "commands/bench", "commands"),
    *("serving/gateway", "serving/gateway/engines", "serving"),
    "serving/web",  # reaches the server by its public endpoints alone
    "rollout",
    "bench",
    *(
        "learning",
        "learning/loop",
        "learning/adapting",
        "learning/distillation",
        "learning/labelling",
        "learning/fitting",
    ),
    "learning/judging",
    "learning/data",
    *("demo", "doctor", "calibrate", "loading"),
    *("runner", "batching", "answering", "way", "prepared", "wired"),
    *("model_face", "pretrained"),
    "execution",
    "control",
    "evaluation",
    "cost",
    "models",
    "calibration",  # the former place of classes that pickled routers name
    "policy",
    *("reply", "decisions", "decision_log"),
    "features",
    *("fusion", "reduction"),
    "media",
    *(
        "point",
        "budget",
        "jsonl",
        "plots",
        "progress",
        "file_lock",
        "user_cache",
        "times",
        "log_schema",
        "checks",
        "reference",
        "errors",
    ),
)
UPWARD = {
    ("adaptive_fusion.runner", "adaptive_fusion.serving.gateway.remote"),  # what `AdaptiveRunner.remote` gives back
}
"""Imports that go up, each when it is asked for: the one name under which users look for two things."""
BEYOND_RUNTIME = ("learning", "bench", "rollout")
"""Never imported by the runtime; commands import them when they run."""
HEAVY = {"sklearn", "joblib", "matplotlib", "duckdb", "pandas", "sacrebleu", "pickle", "dill", "cloudpickle"}
NETWORK = {"requests", "urllib", "httpx", "httpx2", "httpcore2", "aiohttp", "http", "socket", "urllib3"}


class Import(NamedTuple):
    module: str
    target: str
    line: int
    lazy: bool


def floor(module: str, package: Path = PACKAGE) -> str:
    """The entry of `FLOORS` that a module of the package belongs to: its folder, or itself beside the folders."""
    parts = module.split(".")[1:]
    folder = parts if package.joinpath(*parts).is_dir() else parts[:-1] or parts
    return "/".join(folder) or "__init__"


def modules(package: Path = PACKAGE) -> Iterator[tuple[str, Path]]:
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).with_suffix("").as_posix().replace("/", ".")
        yield name.removesuffix(".__init__"), path


def imports(name: str, path: Path, package: Path = PACKAGE) -> Iterator[Import]:
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
                place = package.parent / whole.replace(".", "/")
                known = place.with_suffix(".py").exists() or place.is_dir()
                yield Import(name, whole if known else str(node.module), node.lineno, lazy)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


ALL = [found for name, path in modules() for found in imports(name, path)]
RUNTIME = [found for found in ALL if floor(found.module).split("/")[0] not in BEYOND_RUNTIME]


def told(found: list[Import]) -> list[str]:
    return [f"{i.module}:{i.line} imports {i.target}" for i in found]


def faults(package: Path) -> list[str]:
    """Folders and modules that are not in `FLOORS`, and imports that go up or sideways."""
    names = {floor(name, package) for name, _ in modules(package)} - {"__init__", "__main__"}
    found = [f"{name} is on no floor" for name in sorted(names - set(FLOORS))]
    place = {name: index for index, name in enumerate(FLOORS)}
    for name, path in modules(package):
        for each in imports(name, path, package):
            if not each.target.startswith("adaptive_fusion."):
                continue
            if (each.module, each.target) in UPWARD:
                continue
            here, there = floor(each.module, package), floor(each.target, package)
            if here != there and here in place and place[here] > place.get(there, -1):
                found.append(f"{each.module}:{each.line} imports {each.target}, which stands above it")
    return found


def test_imports_go_down_only_and_every_folder_has_a_floor() -> None:
    assert not faults(PACKAGE)


def test_a_new_folder_and_an_upward_import_are_found(tmp_path: Path) -> None:
    package = tmp_path / "adaptive_fusion"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.safetensors", "*.json", "__pycache__"))
    added = {
        "extras/tool.py": ("", "extras is on no floor"),
        "gadget.py": ("", "gadget is on no floor"),
        "media/upward.py": ("from adaptive_fusion.runner import AdaptiveRunner", "media.upward:1 imports"),
        "learning/data/upward.py": (
            "import adaptive_fusion.learning.fitting.fit",
            "learning.data.upward:1 imports",
        ),
        "cost/upward.py": ("def f():\n    from adaptive_fusion.bench import report", "cost.upward:2 imports"),
    }
    for file, (text, _) in added.items():
        (package / file).parent.mkdir(exist_ok=True)
        (package / file).write_text(text)
    found = faults(package)
    assert len(found) == len(added)
    for _, fault in added.values():
        assert any(fault in each for each in found), fault


def test_no_two_modules_import_each_other() -> None:
    """Not even when they run, except for a name that has moved and its former place."""
    wanted = {(i.module, i.target) for i in ALL}
    assert not sorted((a, b) for a, b in wanted if a < b and (b, a) in wanted)


def test_unit_tests_lie_in_the_folders_of_what_they_test() -> None:
    there = {
        path.parent.relative_to(ROOT / "tests/unit").as_posix() for path in (ROOT / "tests/unit").rglob("test_*.py")
    }
    assert there - {"."} <= set(FLOORS)


def test_the_runtime_knows_nothing_of_learning() -> None:
    wrong = [
        i
        for i in RUNTIME
        if i.target.startswith("adaptive_fusion.")
        and floor(i.target).split("/")[0] in BEYOND_RUNTIME
        and not (i.lazy and floor(i.module).split("/")[0] == "commands")
    ]
    assert not told(wrong)


def test_heavy_and_unpickling_modules_are_imported_only_when_asked_for() -> None:
    wrong = [i for i in RUNTIME if i.target.split(".")[0] in HEAVY and not i.lazy]
    assert not told(wrong)


def test_ray_which_unpickles_is_imported_only_when_replicas_are_asked_for() -> None:
    """What it unpickles is its own; that is the choice of whoever starts replicas."""
    own = {f"adaptive_fusion.serving.{name}" for name in ("ray", "ray_run", "router")}
    wrong = [i for i in ALL if i.target.split(".")[0] == "ray" and i.module not in own]
    wrong += [i for i in ALL if i.target in own and i.module not in own and not i.lazy]
    assert not told(wrong)
    assert any(i.target.split(".")[0] == "ray" for i in ALL)


def test_only_serving_touches_the_network() -> None:
    wrong = [i for i in ALL if i.target.split(".")[0] in NETWORK and floor(i.module).split("/")[0] != "serving"]
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
    "runner": adaptive_fusion.AdaptiveRunner.__name__,
    "without": not {"sklearn", "joblib", "duckdb", "matplotlib", "rich.progress"} & set(sys.modules),
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
    # Runners need no estimator, no database and no pictures.
    assert seen["runner"] == "AdaptiveRunner" and seen["without"]


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import adaptive_fusion

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adaptive_fusion.nothing  # type: ignore[attr-defined]
