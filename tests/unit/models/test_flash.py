"""cuDNN's attention is off while anybody asks for that, and as it was when nobody does."""

import threading
from collections.abc import Iterator

import pytest
import torch
from waits import joined

from adaptive_fusion.models.flash import flash_first


@pytest.fixture(params=[True, False])
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    found = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(found)


def on() -> bool:
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


def test_threads_that_leave_in_the_order_they_came_leave_it_as_it_was(before: bool) -> None:
    first_left, second_in = threading.Event(), threading.Event()
    seen: list[bool] = []

    def first() -> None:
        with flash_first(torch.device("cuda")):
            assert second_in.wait(60)
        first_left.set()

    def second() -> None:
        with flash_first(torch.device("cuda")):
            second_in.set()
            assert first_left.wait(60)
            seen.append(on())

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    joined(threads)
    assert seen == [False] and on() is before


def test_an_error_inside_and_other_devices_change_nothing(before: bool) -> None:
    with pytest.raises(KeyError), flash_first(torch.device("cuda")):
        assert not on()
        raise KeyError
    with flash_first(torch.device("cpu")):
        assert on() is before
    assert on() is before
