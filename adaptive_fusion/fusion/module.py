"""Fused DeepStack: every tap's share of one strategy in one module, and its safetensors file.

The caller captures the ViT levels, calls `fuse` for each tap, runs the tap's own pretrained merger on the
result, passes the merged tokens through `apply_gate`, and pools all streams of them with `pool`. Knows packed
tensors and lengths; nothing of mergers or model families.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn

from adaptive_fusion.checks import integer, is_integer
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion.files import read_tensors, save_tensors
from adaptive_fusion.fusion.kernels import Combine, CompiledSum, check_packed, expand_rows, weighted_sum
from adaptive_fusion.fusion.levels import check_levels, depth_profile, group_levels
from adaptive_fusion.fusion.strategies import STRATEGIES, TapFusion
from adaptive_fusion.reduction.learned_pool import WindowPool
from adaptive_fusion.reduction.pool import Grid, downsample, window

FORMAT = "adaptive_fusion.fusion"
VERSION = "2"
POOLED_SIDES = (2, 4)
"""Window sides with a learned pooling; others are plain averages."""


@dataclass(frozen=True)
class FusionSpec:
    """What a fusion module is built for; two modules with equal specs have interchangeable weights.

    Attributes:
        strategy: a name in `STRATEGIES`.
        taps: the model's DeepStack taps, as ViT block indices, ascending; may be empty.
        levels: the levels that take part (see `select_levels`), the taps among them.
        d_vision: width of the ViT.
        rank: rank of the per-level adapters, 0 for none.
        d_text: width of the merged tokens; 0 leaves the learned pooling out.
        elastic: counts of levels that the module was trained to serve beside its own, by a part of itself (see
            `adaptive_fusion.fusion.elastic`); not what it is built for, so specs that differ in it alone are equal.

    Raises ConfigError where a value is out of range.
    """

    strategy: str
    taps: tuple[int, ...]
    levels: tuple[int, ...]
    d_vision: int
    rank: int = 0
    d_text: int = 0
    elastic: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        STRATEGIES.get(self.strategy)
        object.__setattr__(self, "taps", check_levels("taps", self.taps))
        object.__setattr__(self, "levels", check_levels("levels", self.levels))
        group_levels(self.levels, self.taps)
        for name, value, least in (("d_vision", self.d_vision, 1), ("rank", self.rank, 0), ("d_text", self.d_text, 0)):
            integer(value, name, least, 2**16)
        if any(not is_integer(count) or not 1 <= count < len(self.levels) for count in self.elastic):
            raise ConfigError(f"elastic is {self.elastic!r}; expected counts below the {len(self.levels)} levels")

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The levels of each tap's group, ascending; empty for a model without taps."""
        return group_levels(self.levels, self.taps)

    def metadata(self) -> dict[str, str]:
        """The spec as a safetensors header."""
        elastic = {"elastic": ",".join(map(str, self.elastic))} if self.elastic else {}
        return {
            "format": FORMAT,
            "version": VERSION,
            "strategy": self.strategy,
            "taps": ",".join(map(str, self.taps)),
            "levels": ",".join(map(str, self.levels)),
            "d_vision": str(self.d_vision),
            "rank": str(self.rank),
            "d_text": str(self.d_text),
            **elastic,
        }

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The spec in a file's header; raises ConfigError if it is not a fusion file of this version."""
        return cls._parse(read_tensors(path)[1], Path(path).name)

    @classmethod
    def _parse(cls, found: Mapping[str, str], name: str) -> Self:
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise ConfigError(
                f"{name} has format {found.get('format')!r} version {found.get('version')!r}; "
                f"expected {FORMAT!r} version {VERSION!r}"
            )
        expected = {"format", "version", "strategy", "taps", "levels", "d_vision", "rank", "d_text"}
        if set(found) - {"elastic"} != expected:
            raise ConfigError(f"{name} has the header keys {sorted(found)}; expected {sorted(expected)}")
        try:
            taps, levels = (tuple(int(i) for i in found[key].split(",") if i) for key in ("taps", "levels"))
            widths = (int(found[key]) for key in ("d_vision", "rank", "d_text"))
            elastic = tuple(int(i) for i in found.get("elastic", "").split(",") if i)
            return cls(found["strategy"], taps, levels, next(widths), next(widths), next(widths), elastic)
        except ValueError as error:
            raise ConfigError(f"{name} has an unusable header {dict(found)!r}: {error}") from error


class DeepStackFusion(nn.Module):
    """One strategy over all taps of a model.

    Untrained `native`, `weighted` and `gated` leave the model as it is; see the law in
    `adaptive_fusion.fusion.strategies` for what gets gradient when. Parameters are float32; features keep
    their own dtype.
    """

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__()
        self.spec = spec
        kind = STRATEGIES.get(spec.strategy)
        profile = dict(zip(spec.levels, depth_profile(len(spec.levels)) if spec.levels else (), strict=True))
        self.taps = nn.ModuleList(
            kind(group.index(tap), [profile[i] for i in group], spec.d_vision, spec.rank)
            for tap, group in zip(spec.taps, spec.groups, strict=True)
        )
        sides = POOLED_SIDES if spec.taps and spec.d_text and kind.pooling != "average" else ()
        by_content = kind.pooling == "content"
        self.pools = nn.ModuleDict(
            {str(side): WindowPool(side, 1 + len(spec.taps), spec.d_text, spec.rank, by_content) for side in sides}
        )
        self.home: torch.device | None = None

    @property
    def device(self) -> torch.device | None:
        """Where it computes: its parameters' device, that of the module it is a part of, or None for anywhere."""
        return next((parameter.device for parameter in self.parameters()), self.home)

    def fuse(self, tap_index: int, levels: Mapping[int, Tensor], lengths: Sequence[int]) -> Tensor:
        """Input of tap `tap_index`'s merger (0 is the first tap).

        Args:
            levels: captured ViT levels by block index, at least those of ``spec.groups[tap_index]``, each
                with the packed patches of all images, ``[patches, d_vision]``.
            lengths: patches per image; for a clip all its frames together, so that it gets one gate.

        Returns ``[patches, d_vision]`` in the levels' dtype; it may be the tap's own level itself, so do
        not write to it.
        Raises ConfigError for an unknown tap, a missing level or shapes that do not fit.
        """
        tap, features = self._group(tap_index, levels, lengths)
        return tap.fuse(features, lengths)

    def fuse_and_gate(
        self, tap_index: int, levels: Mapping[int, Tensor], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor | float]:
        """What `fuse` gives and, from the same levels, what `gate` gives."""
        tap, features = self._group(tap_index, levels, lengths)
        return tap.both(features, lengths)

    def _group(
        self, tap_index: int, levels: Mapping[int, Tensor], lengths: Sequence[int]
    ) -> tuple[TapFusion, list[Tensor]]:
        tap, group = self._tap(tap_index), self.spec.groups[tap_index]
        if missing := [i for i in group if i not in levels]:
            raise ConfigError(
                f"tap {tap_index} needs the levels {list(group)}; {missing} are not among {sorted(levels)}"
            )
        features = [levels[i] for i in group]
        self._check(features, lengths)
        return tap, features

    def gate(self, tap_index: int, features: Tensor, lengths: Sequence[int]) -> Tensor | float:
        """g_t of tap `tap_index` from its own level ``[patches, d_vision]``.

        Returns ``[n_images]`` in float32, or a float where the strategy has the same constant for every
        image (1.0, and 0.0 for `top`). Raises ConfigError as `fuse` does.
        """
        tap = self._tap(tap_index)
        self._check([features], lengths)
        return tap.gate(features, lengths)

    def pool(self, streams: Sequence[Tensor], grids: Sequence[Grid], ratio: float) -> list[Tensor]:
        """Pool the merged tokens of all streams together: the last level's, then every tap's.

        Args:
            streams: ``[tokens, d_text]`` each, packed as for `downsample`.
            grids: frames, rows and columns per image or clip, in merged tokens.
            ratio: 1/k.

        Returns as many ``[pooled, d_text]`` in their dtype. Raises ConfigError as `downsample` does.
        """
        key = str(window(ratio))
        if key not in self.pools:
            return [downsample(stream, grids, ratio) for stream in streams]
        found: list[Tensor] = self.pools[key](streams, grids)
        return found

    def compile_kernels(self, max_shapes: int = 8, backend: str = "inductor") -> None:
        """Sum levels with `CompiledSum` at inference, for at most `max_shapes` kinds of input; with the backend
        ``triton`` by kernels that also weigh them and add the adapters' share.

        Raises ConfigError where Triton is not installed.
        """
        combine = _triton_sum() if backend == "triton" else CompiledSum(max_shapes, backend)
        for tap in self.taps:
            cast(TapFusion, tap).combine = combine

    def use_device_kernels(self) -> None:
        """On a GPU with Triton its kernels, unless others were asked for: the eager form's launches take longer there
        than its arithmetic. Not on GPUs before Ampere, which do not multiply in bfloat16."""
        if self.device is None or self.device.type != "cuda" or find_spec("triton") is None:
            return
        if torch.cuda.get_device_capability(self.device) < (8, 0):
            return
        if all(cast(TapFusion, tap).combine is weighted_sum for tap in self.taps):
            self.compile_kernels(backend="triton")

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the parameters, as `dtype`, and the spec to a safetensors file, replacing it whole or not at all.

        Raises:
            ConfigError: For a part (`cut`) that no module of its spec can hold.
        """
        with torch.device("meta"):
            known = type(self)(self.spec).state_dict()
        if more := sorted(set(self.state_dict()) - set(known)):
            raise ConfigError(f"a part whose tap has one level holds {more} too; save the module that it is a part of")
        tensors = {name: value.detach().to(dtype).contiguous() for name, value in self.state_dict().items()}
        save_tensors(path, tensors, self.spec.metadata())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the parameters of a file; ConfigError, and no change, unless its spec and tensors fit."""
        self._load(path, assign=False)

    def _load(self, path: str | os.PathLike[str], assign: bool) -> None:
        name = Path(path).name
        tensors, header = read_tensors(path)
        found = FusionSpec._parse(header, name)
        if found != self.spec:
            raise ConfigError(f"{name} holds {found}; expected {self.spec}")
        have = {key: tuple(value.shape) for key, value in tensors.items()}
        want = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        if have != want:
            differing = sorted(set(have.items()) ^ set(want.items()))
            raise ConfigError(f"{name} and the module differ in these tensors: {differing}")
        if broken := sorted(key for key, value in tensors.items() if not torch.isfinite(value).all()):
            raise ConfigError(f"{name} has values that are not finite in {broken}")
        self.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=assign)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """The module a file was saved from; raises ConfigError as `FusionSpec.read` and `load` do."""
        spec = FusionSpec.read(path)
        # Without memory at first: a header may claim any size, and only tensors of that size bear it out.
        with torch.device("meta"):
            module = cls(spec)
        module._load(path, assign=True)
        return module

    def _tap(self, index: int) -> TapFusion:
        if not 0 <= index < len(self.taps):
            raise ConfigError(f"tap is {index!r}; expected 0 to {len(self.taps) - 1} ({len(self.taps)} taps)")
        return cast(TapFusion, self.taps[index])

    def _check(self, features: Sequence[Tensor], lengths: Sequence[int]) -> None:
        check_packed(features, lengths)
        if features[0].shape[1] != self.spec.d_vision:
            raise ConfigError(f"levels are {features[0].shape[1]} wide; expected d_vision {self.spec.d_vision}")


def _triton_sum() -> Combine:
    try:
        from adaptive_fusion.fusion.kernels_triton import TritonSum
    except ModuleNotFoundError as error:
        raise ConfigError(f"backend is 'triton', which is not installed ({error}); expected one that is") from error
    return TritonSum()


def apply_gate(tokens: Tensor, gate: Tensor | float, lengths: Sequence[int]) -> Tensor:
    """Multiply merged tokens ``[M, D]`` by g_t, one value per image (`lengths` merged tokens each).

    A gate of exactly 1.0 returns the same tensor. The product is taken in float32 and rounded to the
    tokens' dtype.
    """
    if isinstance(gate, float):
        return tokens if gate == 1.0 else tokens * gate
    check_packed([tokens], lengths)
    if gate.shape != (len(lengths),):
        raise ConfigError(f"gate has shape {list(gate.shape)}; expected [{len(lengths)}], one value per image")
    rows = expand_rows(gate[:, None], lengths)
    if torch.is_grad_enabled() and (tokens.requires_grad or rows.requires_grad):
        return (tokens * rows).to(tokens.dtype)
    return torch.mul(tokens, rows, out=torch.empty_like(tokens))
