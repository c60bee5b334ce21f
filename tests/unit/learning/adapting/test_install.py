"""An installed policy is there as a whole or not at all, whenever the process dies and however little room there is."""

import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

from adaptive_fusion.learning.adapting.install import install
from adaptive_fusion.policy.auto import choose
from adaptive_fusion.policy.fitted import Fingerprint, Fitted
from adaptive_fusion.policy.policy import LANES, Policy
from adaptive_fusion.policy.router import constant_router
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.user_cache import user_policies_dir

MODEL = Fingerprint("Model", {"depth": 2}, {"depth": 2}, "abc")
NAME = "adapted-model"


def made(folder: Path, p_complex: float) -> Path:
    """A policy's folder; the probability tells versions apart."""
    lanes = dict.fromkeys(LANES, (Rung.parse("native@1"),))
    policy = Policy(NAME, constant_router(p_complex), 0.5, lanes, fitted=Fitted(MODEL))
    (policy.save(folder) / "README.md").write_text("card " * 2000)
    return folder


def used(environ: dict[str, str]) -> float | None:
    """P(complex) of the policy that the model gets; None for the general one. Nothing may be unreadable."""
    chosen = choose("auto", MODEL, environ)
    assert chosen.skipped == ()
    if chosen.policy.name == "balanced":
        return None
    folder = next(file.parent for file in user_policies_dir(environ).glob("[!.]*/README.md"))
    assert folder.joinpath("README.md").stat().st_size == 10_000
    return round(float(chosen.policy.router.p_complex_batch([[]])[0]), 3)  # type: ignore[arg-type]


def dies_at(event: int, folder: Path, root: Path) -> bool:
    """Install in a process that ends without a word at its so-many-th look at the file system; whether it did."""
    child = os.fork()
    if child == 0:
        seen = 0

        def audit(name: str, _: object) -> None:
            nonlocal seen
            if name.startswith(("open", "os.", "shutil.", "tempfile.")):
                seen += 1
                if seen == event:
                    os._exit(9)

        sys.addaudithook(audit)
        try:
            install(folder, root, NAME)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_whenever_it_dies_the_old_policy_or_the_new_one_is_used(tmp_path: Path) -> None:
    old, new = made(tmp_path / "old", 0.25), made(tmp_path / "new", 0.75)
    before = {"XDG_CACHE_HOME": str(tmp_path / "before")}
    os.utime(install(old, user_policies_dir(before), NAME) / "policy.toml", (1e9, 1e9))
    found, event, died = set(), 0, True
    while died:
        event += 1
        shutil.copytree(tmp_path / "before", tmp_path / f"{event}")
        environ = {"XDG_CACHE_HOME": str(tmp_path / f"{event}")}
        died = dies_at(event, new, user_policies_dir(environ))
        found.add(used(environ))
    assert found == {0.25, 0.75} and event > 15
    for each in (3, event // 2, event - 2):  # and whatever was left behind is in nobody's way
        environ = {"XDG_CACHE_HOME": str(tmp_path / f"{each}")}
        install(new, user_policies_dir(environ), NAME)
        assert used(environ) == 0.75 and len(list(user_policies_dir(environ).glob("[!.]*"))) == 1


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    root = user_policies_dir(environ)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for before in (None, 0.25):
        if before is not None:
            install(made(tmp_path / "old", before), root, NAME)
        folder = made(tmp_path / f"new-{before}", 0.75)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OSError):
                install(folder, root, NAME)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert used(environ) == before
        assert not list(root.glob(".*"))


def test_the_same_policy_again_is_the_newest_again(tmp_path: Path) -> None:
    root = tmp_path / "policies"
    first = install(made(tmp_path / "a", 0.25), root, NAME)
    os.utime(first / "policy.toml", (1e9, 1e9))
    assert install(tmp_path / "a", root, NAME) == first
    assert (first / "policy.toml").stat().st_mtime > 1e9
    (first / "router.json").unlink()  # as one that died while it removed this version leaves it
    (first / "policy.toml").unlink()
    assert install(tmp_path / "a", root, NAME) == first
    assert sorted(each.name for each in first.iterdir()) == ["README.md", "policy.toml", "router.json"]
    (root / f"{NAME}-of-another").mkdir()
    install(made(tmp_path / "b", 0.5), root, NAME)
    assert sorted(each.name.startswith(NAME) for each in root.iterdir()) == [True, True]
