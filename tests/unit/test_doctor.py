"""What `doctor` makes of sound and unsound set-ups."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from adaptive_fusion import doctor

ROOT = Path(__file__).parents[2]
SOUND: dict[str, str | None] = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "transformers": "5.23.0",
    "numpy": "2.0.0",
    "opencv-python-headless": "4.10.0.84",
    "pillow": "11.3.0",
    "safetensors": "0.5.0",
    "typer": "0.20.0",
    "rich": "13.0.0",
    "opencv-python": None,
}


def test_accepted_versions_are_those_of_the_package() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirements = {r.name: r.specifier for r in map(Requirement, stated)}
    assert {name: SpecifierSet(accepted) for name, (accepted, _) in doctor.REQUIRED.items()} == {
        name: requirements[name] for name in doctor.REQUIRED
    }


def test_sound_versions_pass() -> None:
    assert [check.status for check in doctor.check_versions(SOUND)] == ["ok"] * len(doctor.REQUIRED)


@pytest.mark.parametrize(
    ("name", "version", "advice"),
    [
        ("torch", "2.9.1+cu128", "Conv3d"),
        ("torch", None, "pip install 'torch>=2.11'"),
        ("transformers", "5.22.0", "'transformers>=5.23,<6'"),
        ("transformers", "6.0.0", "'transformers>=5.23,<6'"),
        ("pillow", "10.0.0", "known holes"),
        ("numpy", "not a version", "numpy>=1.26"),
    ],
)
def test_an_unsound_version_is_broken_with_what_to_do(name: str, version: str | None, advice: str) -> None:
    broken = [c for c in doctor.check_versions({**SOUND, name: version}) if c.status == "broken"]
    assert [check.name for check in broken] == [name]
    assert advice in broken[0].advice and broken[0].found == (version or "not installed")


def test_development_builds_count_as_the_release_they_lead_to() -> None:
    checks = doctor.check_versions({**SOUND, "torch": "2.15.0.dev20261101+cu130"})
    assert all(check.status == "ok" for check in checks)


@pytest.mark.parametrize(
    ("torch", "torchvision", "error", "status", "said"),
    [
        ("2.14.1+cu130", "0.29.1", None, "ok", "torchvision 0.29.1"),
        ("2.11.0", "0.26.0", None, "ok", "torch 2.11.0"),
        ("2.14.1", "0.28.0", None, "broken", "torchvision==0.29.*"),
        ("2.14.1", None, None, "broken", "install torch and torchvision together"),
        (
            "2.14.1+cpu",
            "0.29.1",
            RuntimeError("operator torchvision::nms does not exist"),
            "broken",
            "'torchvision==0.29.*' --index-url https://download.pytorch.org/whl/cpu",
        ),
        ("2.14.1", "0.29.1", OSError("undefined symbol: _ZN3c10"), "broken", "undefined symbol"),
    ],
)
def test_torchvision_must_be_the_one_made_for_torch(
    torch: str, torchvision: str | None, error: Exception | None, status: str, said: str
) -> None:
    check = doctor.check_torchvision(torch, torchvision, error)
    assert check.status == status and said in check.found + check.advice


def test_two_builds_of_opencv_are_noted_and_a_broken_one_is_broken() -> None:
    both = doctor.check_opencv({**SOUND, "opencv-python": "4.10.0.84"}, None)
    assert both.status == "note" and "uninstall" in both.advice
    assert doctor.check_opencv(SOUND, ImportError("libGL.so.1")).status == "broken"
    assert doctor.check_opencv(SOUND, None).status == "ok"


def test_an_old_python_is_broken() -> None:
    assert doctor.check_python((3, 10)).status == "broken"
    assert doctor.check_python((3, 14)).status == "ok"


def test_a_torchvision_that_does_not_fit_is_recognised_without_a_crash(tmp_path: Path) -> None:
    """The real command beside a torchvision that fails as one built for another torch does."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    found = subprocess.run(
        [sys.executable, "-m", "adaptive_fusion.cli", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 1 and "Traceback" not in found.stderr
    report = json.loads(found.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert not report["ok"]
    fits = checks["torchvision fits torch"]
    assert fits["status"] == "broken" and "nms does not exist" in fits["found"]
    assert "pip install --force-reinstall --no-deps 'torchvision==" in fits["advice"]
    assert checks["reference model"]["status"] == "broken" and "mend" in checks["reference model"]["advice"]
    assert checks["policies"]["status"] == "ok"
