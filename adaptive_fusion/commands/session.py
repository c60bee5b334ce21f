"""What a call of the command line does with a runner before its first file.

Knows the runner. Must not know of single commands.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive_fusion.runner import AdaptiveRunner


def warm_up(runner: "AdaptiveRunner") -> None:
    """Pay once for lazy imports and first-use allocations, so that they do not count against the first file.

    Goes around the decision, so the controller does not learn from it.
    """
    from PIL import Image

    from adaptive_fusion.point import NATIVE

    image = Image.new("RGB", (64, 64))
    runner.decide(image, "?")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
    inputs = runner.adapter.prepare([{"role": "user", "content": content}], NATIVE)
    with runner.exclusive() as model:
        model.generate(**inputs, max_new_tokens=2)  # type: ignore[operator]
