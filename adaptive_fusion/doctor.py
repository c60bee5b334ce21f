"""Is this set-up sound? Versions, devices, backends and combinations that are known to be bad, with what to do.

Every check looks for itself, survives whatever it finds, and says so in a `Check`. Nothing heavy is imported at
the top: a set-up in which torch or torchvision cannot be imported is exactly what this is for.
"""

import importlib
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any, Literal

Status = Literal["ok", "note", "broken"]

REQUIRED = {
    "torch": (">=2.11", "2.9 runs the Conv3d of Qwen3-VL's patch embedding 10 to 20 times slower"),
    "torchvision": (">=0.26", "the Qwen image and video processors need it, in the version made for torch"),
    "transformers": (">=5.23,<6", "encoder outputs can be passed to generate from 5.23 on"),
    "numpy": (">=1.26", ""),
    "opencv-python-headless": (">=4.10", ""),
    "pillow": (">=11.3", "earlier releases carry image decoders with known holes"),
    "safetensors": (">=0.5", ""),
    "typer": (">=0.15", ""),
    "rich": (">=13", ""),
}
"""Distributions that every command needs: accepted versions, and why where that is not plain."""

OPTIONAL = {
    "av": ("av", "video", "video files cannot be read (animated GIFs can)"),
    "matplotlib": ("matplotlib", "train", "plots cannot be drawn"),
    "duckdb": ("duckdb", "train", "policies cannot be trained from logs"),
    "flash-attn 2": ("flash_attn", "", "attn_implementation='flash_attention_2' is not available; sdpa is used"),
    "flash-attn 3": ("flash_attn_interface", "", "attn_implementation='flash_attention_3' is not available"),
}
"""Modules that some functions need: module, the extra that brings it, and what is missing without it."""

_TORCHVISION_LEAD = 15
"""torchvision 0.(n + 15) belongs to torch 2.n: 0.26 to 2.11, 0.29 to 2.14."""


@dataclass(frozen=True)
class Check:
    """One finding: ``ok``, ``note`` (something optional is missing) or ``broken``, and what to do about it."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine(model: str | None = None) -> Iterator[Check]:
    """Run every check, cheapest first; those of a `model` (see `open_runner`) last, if one is named."""
    yield check_python(sys.version_info[:2])
    versions = installed_versions()
    yield from check_versions(versions)
    torch_error = import_error("torch")
    if torch_error is not None:
        yield Check(
            "torch imports",
            "broken",
            brief(torch_error),
            "reinstall torch for this platform: pytorch.org/get-started",
        )
        return
    # Asked of the module: PyPI's metadata leaves out the build (+cpu, +cu130) that matters here.
    torch_version = str(importlib.import_module("torch").__version__)
    yield check_torchvision(torch_version, versions.get("torchvision"), import_error("torchvision"))
    yield check_opencv(versions, import_error("cv2"))
    yield from check_devices()
    yield check_attention()
    yield from check_optional()
    yield from check_policies()
    yield from check_reference()
    if model is not None:
        yield from check_model(model)


def installed_versions() -> dict[str, str | None]:
    """Version of each of `REQUIRED` as its metadata says it, without importing anything; None if absent."""
    return {name: _version(name) for name in (*REQUIRED, "opencv-python")}


def import_error(module: str) -> BaseException | None:
    """What importing `module` raises, of any kind, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return error
    return None


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or later."""
    found = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return Check("python", "broken", found, "use Python 3.11 or later")
    return Check("python", "ok", found)


def check_versions(versions: Mapping[str, str | None]) -> Iterator[Check]:
    """Each of `REQUIRED` is there in an accepted version."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    for name, (accepted, why) in REQUIRED.items():
        found = versions.get(name)
        advice = f"pip install '{name}{accepted}'" + (f" ({why})" if why else "")
        if found is None:
            if name == "opencv-python-headless" and versions.get("opencv-python"):
                continue  # the desktop build serves as well; check_opencv imports it
            yield Check(name, "broken", "not installed", advice)
            continue
        try:
            good = SpecifierSet(accepted).contains(Version(found).base_version, prereleases=True)
        except InvalidVersion:
            good = False
        yield Check(name, "ok" if good else "broken", found, "" if good else advice)


def check_torchvision(torch: str | None, torchvision: str | None, error: BaseException | None) -> Check:
    """torchvision imports and is the build made for this torch.

    Args:
        torch: Version with its local part, such as ``2.14.1+cpu``.
        torchvision: The same of torchvision.
        error: What importing torchvision raised.
    """
    name, pair = "torchvision fits torch", f"torch {torch}, torchvision {torchvision}"
    numbers = re.match(r"2\.(\d+)\.(\d+)", torch or "")
    if torchvision is None or numbers is None:
        return Check(name, "broken", pair, "install torch and torchvision together: pytorch.org/get-started")
    build = torch.partition("+")[2] if torch else ""
    wanted = f"0.{int(numbers[1]) + _TORCHVISION_LEAD}"
    source = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    fix = f"pip install --force-reinstall --no-deps 'torchvision=={wanted}.*'{source}"
    if error is not None:
        if "torchvision::nms" in str(error):
            why = "torchvision's operators were built for another torch (often PyPI's beside a CPU-only torch)"
            return Check(
                name, "broken", f"{pair}: {brief(error)}", f"{fix} ({why}; every Qwen processor fails without it)"
            )
        return Check(name, "broken", f"{pair}: {brief(error)}", fix)
    if not torchvision.startswith(f"{wanted}."):
        return Check(name, "broken", f"{pair}, expected {wanted}", fix)
    return Check(name, "ok", pair)


def check_opencv(versions: Mapping[str, str | None], error: BaseException | None) -> Check:
    """OpenCV imports, and only one of its builds is installed: they overwrite each other's files."""
    both = [name for name in ("opencv-python", "opencv-python-headless") if versions.get(name)]
    if error is not None:
        return Check("opencv imports", "broken", brief(error), "pip install --force-reinstall opencv-python-headless")
    if len(both) > 1:
        return Check(
            "opencv imports", "note", " and ".join(both), "pip uninstall opencv-python; both write to the folder cv2"
        )
    return Check("opencv imports", "ok", ", ".join(both))


def check_devices() -> Iterator[Check]:
    """What torch can run on, and which number formats really multiply there."""
    import torch

    yield Check(
        "device cpu",
        "ok",
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; " + _dtypes("cpu"),
    )
    for kind in ("cuda", "xpu", "mps"):
        backend: Any = getattr(torch, kind)
        try:
            count = backend.device_count() if backend.is_available() else 0
        except Exception as error:
            yield Check(f"device {kind}", "broken", brief(error), "check the driver against torch's build")
            continue
        for index in range(count):
            yield Check(f"device {kind}:{index}", "ok", f"{_device_name(backend, index)}; {_dtypes(f'{kind}:{index}')}")
    if torch.version.cuda and not torch.cuda.is_available():
        yield Check(
            "device cuda",
            "note",
            f"torch is built for CUDA {torch.version.cuda}, no device is visible",
            "check nvidia-smi",
        )


def check_attention() -> Check:
    """The attention backends that transformers can be asked for."""
    import torch

    backends = ["eager"]
    if hasattr(torch.nn.functional, "scaled_dot_product_attention"):
        backends.insert(0, "sdpa (default)")
    for name, module in (("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")):
        if util.find_spec(module) is not None:
            error = import_error(module)
            backends.append(name if error is None else f"{name} fails to import ({brief(error)})")
    broken = any("fails" in name for name in backends)
    advice = "reinstall flash-attn for this torch, or uninstall it" if broken else ""
    return Check("attention", "broken" if broken else "ok", ", ".join(backends), advice)


def check_optional() -> Iterator[Check]:
    """`OPTIONAL` modules: there, missing, or there and not importable."""
    for name, (module, extra, without) in OPTIONAL.items():
        how = f"pip install 'adaptive-fusion[{extra}]'" if extra else "needs an NVIDIA GPU; pip install flash-attn"
        if util.find_spec(module) is None:
            yield Check(name, "note", f"not installed: {without}", how)
        elif extra:
            error = import_error(module)
            yield (
                Check(name, "ok", _version(module) or "found")
                if error is None
                else Check(name, "broken", brief(error), how)
            )


def check_policies() -> Iterator[Check]:
    """The shipped policies load."""

    def load() -> str:
        from adaptive_fusion.policy.policy import Policy

        return ", ".join(Policy.load(name).name for name in Policy.shipped())

    yield _try("policies", load, "reinstall adaptive-fusion")


def check_reference() -> Iterator[Check]:
    """The embedded model loads and answers one image; whether this machine has a measured profile of it."""
    found: list[Any] = []

    def ask() -> str:
        from PIL import Image

        from adaptive_fusion.loading import open_runner

        with warnings.catch_warnings(action="ignore"):  # what they say is a check of its own
            runner = open_runner("reference", "auto")
        found.append(runner)
        reply = runner.chat(Image.new("RGB", (64, 64), "red"), "Describe the screen.", max_new_tokens=2)
        return (
            f"answers on {runner.adapter.device} in {runner.adapter.dtype}".replace("torch.", "")
            + f", {reply.measurement.visual_tokens} visual tokens"
        )

    yield _try("reference model", ask, "mend what is broken above, else reinstall adaptive-fusion")
    for runner in found:
        yield from check_policy(runner)
        yield check_profile(runner)


def check_model(model: str) -> Iterator[Check]:
    """A model loads; which policy it gets, whether that fits, and whether its costs have been measured here."""
    found: list[Any] = []

    def load() -> str:
        from adaptive_fusion.loading import open_runner

        with warnings.catch_warnings(action="ignore"):
            found.append(open_runner(model, "auto"))
        return f"{found[0].fingerprint.in_words()} on {found[0].adapter.device}"

    yield _try("model", load, "expected reference, a folder in Hugging Face format, or the id of a model on the Hub")
    for runner in found:
        yield from check_policy(runner)
        yield check_profile(runner)


def check_policy(runner: Any) -> Iterator[Check]:
    """Which policy a runner has and why, what that was fitted to, and which of the user's own could not be read."""
    chosen, policy = runner.chosen, runner.policy
    age = "" if chosen.written_s is None else f", {(time.time() - chosen.written_s) / 86_400:.0f} days old"
    found = f"{policy.name}: {chosen.note}{age}; fitted to {policy.fitted.in_words()}"
    advice = "docs/tutorial-policy.md: from your own logs to a policy of this model" if chosen.warning else ""
    yield Check("policy", "note" if chosen.remark else "ok", found, advice)
    points = [rung.point for ladder in policy.lanes.values() for rung in ladder]
    if untrained := sorted({point.fusion for point in points if runner.adapter.untrained(point)}):
        yield Check("fusion", "ok", f"{', '.join(untrained)}: untrained for this model, the native computation")
    for skipped in chosen.skipped:
        yield Check("own policy", "note", skipped, "mend it or remove its folder")


def check_profile(runner: Any) -> Check:
    """Whether this machine has a measured profile of a runner's model."""
    if runner.profile.samples:
        return Check("profile", "ok", runner.profile_note)
    advice = "`adaptive-fusion calibrate` measures one; until then costs are estimated"
    return Check("profile", "note", runner.profile_note, advice)


def _try(name: str, work: Callable[[], str], advice: str) -> Check:
    try:
        return Check(name, "ok", work())
    except Exception as error:
        return Check(name, "broken", brief(error), advice)


def _dtypes(device: str) -> str:
    """The formats in which a small product comes out right on `device`."""
    import torch

    good = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            ones = torch.ones(8, 8, device=device, dtype=dtype)
            if bool(((ones @ ones) == 8).all()):
                good.append(str(dtype).removeprefix("torch."))
        except Exception:  # whatever the backend raises, it means that the format is not supported
            continue
    return ", ".join(good) or "no number format works"


def _device_name(backend: Any, index: int) -> str:
    properties = getattr(backend, "get_device_properties", None)
    if properties is None:
        return "available"
    found = properties(index)
    return f"{found.name}, {found.total_memory / (1 << 30):.1f} GiB"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def brief(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
