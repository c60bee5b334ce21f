import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptive_fusion.models.standing import Weights, _attend, masked, widened
from adaptive_fusion.reduction import blanks
from adaptive_fusion.reduction.blanks import LEAST_SPARED, SHADES, Standing, expected_share, standing

PATCH, MERGE = 8, 2
TOKEN = PATCH * MERGE
SHAPE = (3, 1, PATCH)


def packed(image: np.ndarray) -> Tensor:
    """``[frames, H, W, 3]`` as the processor packs it."""
    t, height, width, _ = image.shape
    h, w = height // TOKEN, width // TOKEN
    cells = torch.from_numpy(image.astype(np.float32)).view(t, h, MERGE, PATCH, w, MERGE, PATCH, 3)
    return cells.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(t * h * w * MERGE**2, -1)


def of(image: np.ndarray, side: int = 2) -> Standing:
    t, height, width, _ = image.shape
    return standing(packed(image), torch.ones(3), [(t, height // TOKEN, width // TOKEN)], MERGE, SHAPE, side)


def flat(rows: int, columns: int, shade: int = 230, frames: int = 1) -> np.ndarray:
    return np.full((frames, rows * TOKEN, columns * TOKEN, 3), shade, np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_who_stands_for_another_is_near_it_and_looks_like_it(t: int, h: int, w: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = flat(h, w, int(rng.integers(256)), t)
    for _ in range(rng.integers(6)):
        top, left = rng.integers(h * TOKEN), rng.integers(w * TOKEN)
        image[rng.integers(t), top : top + rng.integers(1, 60), left : left + rng.integers(1, 60)] = rng.integers(
            256, size=3
        )
    found = of(image, side)

    assert torch.equal(found.source.bincount(minlength=len(found.kept)), found.counts)
    assert torch.equal(found.source[found.kept], torch.arange(len(found.kept)))  # who is encoded stands for itself
    assert sum(found.frames) == sum(found.media) == len(found.kept)
    values = packed(image).view(t * h * w, -1)
    for token, by in enumerate(found.kept[found.source].tolist()):
        if token != by:
            places = [(n // (h * w), n % (h * w) // w // side, n % w // side) for n in (token, by)]
            assert places[0] == places[1]
            assert abs(values[token] - values[by]).max() <= 3 * SHADES
    everything = found.spread(values.view(t * h * w, -1)[found.kept])
    assert everything.shape == values.shape
    assert found.patches(MERGE).view(-1, MERGE**2)[:, 0].tolist() == (found.kept * MERGE**2).tolist()


def test_one_is_encoded_for_a_blank_window_and_all_of_a_busy_one() -> None:
    image = flat(8, 8)
    assert of(image, 4).counts.tolist() == [16] * 4
    image[0, :, :64] = np.random.default_rng(0).integers(0, 256, (128, 64, 3))
    found = of(image, 4)
    assert set(range(64)) - set(found.kept.tolist()) <= {n for n in range(64) if n % 8 > 4}  # beside it as well
    assert not of(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)).counts.gt(1).any()


@pytest.mark.parametrize("contrast", [int(SHADES) + 1, 60, 200])
def test_a_line_of_a_pixel_that_can_be_seen_is_never_left_out(contrast: int) -> None:
    for at in range(16, 48):
        image = flat(4, 4)
        image[0, at, 20:40] -= contrast
        kept = set(of(image, 4).kept.tolist())
        assert {at // TOKEN * 4 + 1, at // TOKEN * 4 + 2} <= kept


def test_grain_is_ground_and_what_lies_on_it_is_not() -> None:
    noise = np.random.default_rng(0).normal(0, 4, (1, 128, 128, 1)).repeat(3, -1)
    image = (flat(8, 8) - 20 + noise).clip(0, 255)
    assert len(of(image.astype(np.uint8), 4).kept) == 4
    image[0, 40:42, 30:60] -= 60
    kept = set(of(image.astype(np.uint8), 4).kept.tolist())
    assert {2 * 8 + 1, 2 * 8 + 2, 2 * 8 + 3} <= kept


def test_grounds_of_two_shades_in_one_window_each_stand_for_their_own() -> None:
    image = flat(4, 4)
    image[0, :, 2 * TOKEN :] -= int(2 * SHADES)
    found = of(image, 4)
    values = packed(image).view(16, -1)
    assert len(found.kept) < 16
    assert torch.equal(values[found.kept[found.source]], values)


def test_below_a_tenth_none_is_left_out_and_from_a_tenth_on_all_that_can_be() -> None:
    rng, spared = np.random.default_rng(0), []
    for columns in range(1, 21):
        image = rng.integers(0, 256, (1, 8 * TOKEN, 20 * TOKEN, 3)).astype(np.uint8)
        image[0, :, : columns * TOKEN] = 200
        found = of(image)
        spared.append(1 - len(found.kept) / len(found.source))
        assert found.all == (spared[-1] == 0)
        if found.all:
            alone = Standing.alone((1, 8, 20), found.kept.device)
            assert torch.equal(alone.source, found.source) and alone.frames == found.frames
    some = [each for each in spared if each]
    assert min(some) == pytest.approx(LEAST_SPARED, abs=0.05) and min(some) >= LEAST_SPARED - 1e-9
    assert spared[0] == 0 and spared[-1] == max(spared) > 0.7
    for edges in np.linspace(0, 0.5, 50):
        assert expected_share(float(edges), 2) <= 1 - LEAST_SPARED or expected_share(float(edges), 2) == 1


def test_several_media_are_those_of_each_alone() -> None:
    images = [flat(3, 5), flat(4, 4, 90, 2), np.random.default_rng(1).integers(0, 256, (1, 32, 48, 3)).astype(np.uint8)]
    grids = [(len(image), image.shape[1] // TOKEN, image.shape[2] // TOKEN) for image in images]
    together = standing(torch.cat([packed(image) for image in images]), torch.ones(3), grids, MERGE, SHAPE, 2)
    alone = Standing.joined([of(image) for image in images])
    assert (together.frames, together.media) == (alone.frames, alone.media)
    for name in ("kept", "source", "counts"):
        assert torch.equal(getattr(together, name), getattr(alone, name))


def test_pixels_in_other_units_and_grain_looked_at_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(0, 4, (1, 96, 128, 1)).repeat(3, -1)
    image = (flat(6, 8) - 20 + noise).clip(0, 255).astype(np.uint8)
    image[0, 40:42, 30:60] -= 60
    pixels, grids, scale = packed(image), [(1, 6, 8)], torch.tensor([2.0, 4.0, 0.5])
    expected = standing(pixels, torch.ones(3), grids, MERGE, SHAPE, 2)
    assert 0 < len(expected.kept) < 48
    monkeypatch.setattr(blanks, "AT_ONCE", 5)
    units = (pixels.view(len(pixels), 3, -1) / scale[:, None]).flatten(1)
    ones = torch.ones(3)
    for values, by in ((units, scale), (units.double(), scale), (pixels.bfloat16(), ones), (pixels.half(), ones)):
        found = standing(values, by, grids, MERGE, SHAPE, 2)
        for name in ("kept", "source", "counts"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_attention_to_one_that_counts_n_times_is_attention_to_n_of_it() -> None:
    counts = torch.tensor([1, 4, 2, 9])
    query, key, value = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    weights = Weights(counts.log())
    found, _ = _attend(torch.nn.Identity(), query, key, value, None, iter([weights]), scaling=0.3)
    many = [each.repeat_interleave(counts, dim=2) for each in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *many, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    for attend in (masked, widened):  # as columns of keys too, which devices other than a CPU take
        for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            own = attend(query.to(dtype), key.to(dtype), value.to(dtype), weights, 0.3)
            assert own.shape == expected.shape and own.dtype == dtype
            torch.testing.assert_close(own.float(), expected, atol=tolerance, rtol=tolerance)
    assert len(weights.made) == 6  # made once for all blocks


@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 8))
def test_more_edges_leave_less_to_spare(one: float, other: float, side: int) -> None:
    few, many = (expected_share(edges, side) for edges in sorted((one, other)))
    assert 1 / side**2 <= few <= many <= 1.0 and expected_share(0.0, side) == pytest.approx(1 / side**2)
