"""Is the installed wheel whole? Run from outside the checkout, with the folder it was installed to as argument."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

import adaptive_fusion
from adaptive_fusion import AdaptiveRunner, Budget, Policy, measure_complexity
from adaptive_fusion.policy.files import shipped_root
from adaptive_fusion.reference import model_path


def check(holds: bool, what: str) -> None:
    """Stop with `what` unless it holds."""
    if not holds:
        sys.exit(f"smoke test of the wheel failed: {what}")
    print(f"ok: {what}")


def main() -> None:
    """All checks, in order."""
    site = Path(sys.argv[1]).resolve()
    package = Path(adaptive_fusion.__file__).resolve().parent
    check(package == site / "adaptive_fusion", f"{package} is the installed package in {site}")
    check((package / "py.typed").is_file(), "type checkers find py.typed")
    check(adaptive_fusion.__version__[0].isdigit(), f"version {adaptive_fusion.__version__} is known")
    check(shipped_root() == package / "policies", "the policies lie inside the package")
    names = Policy.shipped()
    check(
        {"native", "reference-balanced", "reference-latency", "reference-quality"} <= set(names),
        f"policies {names} are there",
    )
    check(all(Policy.load(name).name == name for name in names), "all of them load")
    check(package in model_path().resolve().parents, "the reference model lies inside the package")
    image = Image.effect_noise((160, 128), 60).convert("RGB")
    check(0 <= measure_complexity(image).score <= 1, "complexity is measured")
    runner = AdaptiveRunner.from_pretrained("reference", policy="reference-balanced", budget=Budget(latency_ms=60_000))
    reply = runner.chat(image, "Describe the screen.", max_new_tokens=4)
    check(reply.measurement.new_tokens > 0 and reply.measurement.visual_tokens > 0, "the reference model answers")
    print(reply.decision.explain())
    script = site / "bin" / "adaptive-fusion"
    helped = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, env=os.environ)
    check(helped.returncode == 0 and "explain" in helped.stdout, f"{script.name} --help works {helped.stderr}")


if __name__ == "__main__":
    main()
