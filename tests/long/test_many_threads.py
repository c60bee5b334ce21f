"""Eight threads with twenty requests each, in every form of asking: every answer is the one of a single thread."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from chat_forms import mixed

from adaptive_fusion.runner import AdaptiveRunner


def test_every_answer_equals_the_serial_one(
    reference_model: Any, processor: Any, noise_image: Any, share_of: Callable[[int], int]
) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="reference-balanced")
    images = [noise_image(48 + 16 * i, 64, i) for i in range(4)]
    numbers = range(8 * share_of(20))
    serial = [mixed(runner, images, number) for number in numbers]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: mixed(runner, images, number), numbers)) == serial
