"""Which ViT levels take part in a fusion, and which DeepStack tap each of them joins.

Level ``i`` is the output of ViT block ``i`` (0-based; ``hidden_states[i + 1]`` where the list starts with
the patch embedding). Knows integers only: no tensors, no model.
"""

from collections.abc import Sequence

from adaptive_fusion.checks import integer, is_integer
from adaptive_fusion.errors import ConfigError

LOWER_QUOTA = 3
"""Levels from the lower half of the ViT, where small text and edges live, when more than three take part."""
MAX_DEPTH = 1024
"""Most blocks a ViT is believed to have: choosing among a billion would not end."""


def check_levels(name: str, levels: Sequence[int], depth: int | None = None) -> tuple[int, ...]:
    """`levels` as a tuple; ConfigError unless they are distinct, ascending indices of existing blocks."""
    found = tuple(levels)
    bad = any(not is_integer(i) or i < 0 for i in found)
    if bad or list(found) != sorted(set(found)) or (depth is not None and any(i >= depth for i in found)):
        valid = "0 or more" if depth is None else f"0 to {depth - 1}"
        raise ConfigError(f"{name} is {list(found)!r}; expected distinct ascending block indices, {valid}")
    return found


def select_levels(depth: int, taps: Sequence[int], layers: int) -> tuple[int, ...]:
    """Choose `layers` of the `depth` ViT levels, ascending.

    The native taps always take part, even where they are more than `layers`. Above three levels at least
    `LOWER_QUOTA` come from the lower half (blocks below ``depth / 2``), as far as `layers` and `depth`
    leave room. Every further level is the one farthest from those already chosen and from both ends of the
    ViT; equal distances are decided by the next nearest, and last by depth, the lower first. So each
    choice above three levels contains the smaller ones, and `layers` above `depth` gives every level. A
    model without taps starts from its last level.

    Raises ConfigError for a depth or a number of layers below 1 or above `MAX_DEPTH`, or taps that are not
    blocks of the model.
    """
    for name, value in (("depth", depth), ("layers", layers)):
        integer(value, name, 1, MAX_DEPTH)
    chosen = set(check_levels("taps", taps, depth)) or {depth - 1}
    lower_half = [i for i in range(depth) if 2 * i < depth]
    needs_lower = layers > max(LOWER_QUOTA, len(taps))
    while len(chosen) < min(layers, depth):
        open_lower = [i for i in lower_half if i not in chosen]
        lacks_lower = needs_lower and len(lower_half) - len(open_lower) < LOWER_QUOTA
        candidates = open_lower if lacks_lower and open_lower else [i for i in range(depth) if i not in chosen]
        anchors = (-1, depth, *chosen)
        chosen.add(max(candidates, key=lambda i: (sorted(abs(i - a) for a in anchors), -i)))
    return tuple(sorted(chosen))


def group_levels(levels: Sequence[int], taps: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Group `levels` by tap: each joins the next tap at or above it, those above the last tap join the last.

    Returns one ascending tuple per tap, in tap order; each holds its tap. Without taps there are no groups.
    Raises ConfigError if a tap is not among the levels.
    """
    levels, taps = check_levels("levels", levels), check_levels("taps", taps)
    if missing := sorted(set(taps) - set(levels)):
        raise ConfigError(f"levels {list(levels)} lack the native taps {missing}; every tap must take part")
    if not taps:
        return ()
    groups: dict[int, list[int]] = {tap: [] for tap in taps}
    for level in levels:
        groups[next((tap for tap in taps if tap >= level), taps[-1])].append(level)
    return tuple(tuple(group) for group in groups.values())


def depth_profile(count: int) -> tuple[float, ...]:
    """Starting weights of `count` levels, increasing with depth, of sum 1.

    0.05, 0.08, 0.12, 0.15, 0.25, 0.35 for six levels; other counts read that curve at equal distances.
    """
    integer(count, "count", 1, MAX_DEPTH)
    curve = (0.05, 0.08, 0.12, 0.15, 0.25, 0.35)
    values = []
    for index in range(count):
        position = 5.0 if count == 1 else 5.0 * index / (count - 1)
        left = min(int(position), 4)
        values.append(curve[left] + (curve[left + 1] - curve[left]) * (position - left))
    return tuple(value / sum(values) for value in values)
