"""The encoder-output seam of models with a patch grid: Qwen2.5-VL, Qwen3-VL (dense, MoE), Qwen3.5 and their kin.

``get_image_features`` gives packed merged tokens per image and ``image_grid_thw`` their grid; the transformed outputs
go back in through ``mm_encoder_outputs`` with placeholders and grid to match, so that M-RoPE positions follow. Models
with DeepStack taps get the fusion knobs as well. No method of the model is replaced.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.video_utils import VideoMetadata

from adaptive_fusion.fusion import downsample, pooled_grid
from adaptive_fusion.models import standing as towers
from adaptive_fusion.models.base import Adapter, Encoded, Size, VisualPlan, size_of, takes_outputs
from adaptive_fusion.models.chat_template import media_parts
from adaptive_fusion.models.deepstack import captured_levels, fused_taps, merge_tap
from adaptive_fusion.models.patches import KINDS, grids_of, known, unpatched
from adaptive_fusion.models.placeholders import Segment, shrink
from adaptive_fusion.models.recorded import Recorded
from adaptive_fusion.models.resize import call_options, resized, with_own_options
from adaptive_fusion.models.reuse import REUSE, Medium, Reuse, taken
from adaptive_fusion.models.unwrap import called
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.reduction.blanks import Standing, standing
from adaptive_fusion.reduction.pool import Grid


class GridAdapter(Adapter):
    """Drives any model whose processor gives ``image_grid_thw`` and whose forward takes ``mm_encoder_outputs``."""

    knobs = frozenset({"downsample", "max_pixels", "max_fps", "fusion", "layers", "adapter_rank", "blanks"})
    packed = True

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__(model, processor)
        vision = self.model.config.vision_config
        self.merge = int(vision.spatial_merge_size)
        # Read once: planning asks for them several times a request, and a configuration answers slowly.
        self._depth, self._patch = int(vision.depth), int(vision.patch_size)
        self._temporal = int(vision.temporal_patch_size)
        self._taps = tuple(getattr(vision, "deepstack_visual_indexes", None) or ())
        if not self.taps:
            why = f"{type(self.model).__name__} has no DeepStack taps, so there are no levels to fuse"
            self.refusals = {"fusion": why, "layers": why, "adapter_rank": why}
        if why := towers.why_not(self.model.model.visual):
            self.refusals = {**self.refusals, "blanks": why}
        self.knobs = self.knobs - set(self.refusals)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        config = getattr(model, "config", None)
        vision = getattr(config, "vision_config", None)
        return hasattr(vision, "spatial_merge_size") and hasattr(config, "image_token_id") and takes_outputs(model)

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def taps(self) -> tuple[int, ...]:
        return self._taps

    @property
    def encoder(self) -> tuple[nn.Module, ...]:
        return (self.model.model.visual,)

    def encoded_sides(self, size: Size, point: OperatingPoint) -> tuple[int, int]:
        return self._resized(size, point.max_pixels)

    # What it would cost

    def native_pixels(self, size: Size) -> int:
        height, width = self._resized(size, None)
        return height * width

    def _resized(self, size: Size, max_pixels: int | None) -> tuple[int, int]:
        """Height and width after the processor's own resize, per frame."""
        if size.exact:
            return size.height, size.width
        return resized(self._processor_for(size.clip), size, max_pixels)

    def _processor_for(self, clip: bool) -> Any:
        return self.processor.video_processor if clip else self.processor.image_processor

    def plan(self, sizes: Sequence[Size], point: OperatingPoint) -> VisualPlan:
        segments: list[int] = []
        tokens = 0
        patch, temporal = self._patch, self._temporal
        for size in sizes:
            height, width = self._resized(size, point.max_pixels)
            frames = -(-size.frames // temporal)
            rows, columns = height // patch, width // patch
            segments += [rows * columns] * frames
            t, h, w = pooled_grid(frames, rows // self.merge, columns // self.merge, point.downsample)
            tokens += t * h * w
        return VisualPlan(tuple(segments), tokens)

    # Media to tensors

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        point: OperatingPoint,
        *,
        tools: Sequence[Any] = (),
        continues: bool | None = None,
        reuse: Reuse | None = None,
    ) -> dict[str, Any]:
        """See `Adapter.prepare`."""
        processor, kwargs = self.processor, dict[str, Any]()
        parts = media_parts(messages)
        if images := [part for part in parts if part["type"] == "image"]:
            done = [self._image(part, point) for part in images]
            options = [each for _, each in done]
            processor = with_own_options(processor, "image_processor", options, known(reuse, "image"))
            kwargs["images"] = [image for image, _ in done]
            # What is each one's own must not be all others' too.
            kwargs["images_kwargs"] = options[0] if processor is self.processor else {}
        if clips := [part for part in parts if part["type"] == "video"]:
            fewer = [{**part, "video": part["video"].at_most(point.max_fps)} for part in clips]
            options, before = [self._options(size_of(part), point.max_pixels) for part in fewer], processor
            there = known(reuse, "video", [VideoMetadata(**part["video"].metadata()) for part in fewer])
            processor = with_own_options(processor, "video_processor", options, there)
            kwargs["videos"] = [part["video"].frames for part in fewer]
            kwargs["videos_kwargs"] = {
                **(options[0] if processor is before else {}),
                "do_sample_frames": False,
                # Said: frames three pixels high could be taken for channels first.
                "input_data_format": "channels_last",
                "video_metadata": [part["video"].metadata() for part in fewer],
            }
        found = self._template.tensors(messages, tools, continues, processor, **kwargs)
        return {**found.to(self.device), **({REUSE: reuse} if reuse is not None else {})}

    def _image(self, part: Mapping[str, Any], point: OperatingPoint) -> tuple[Any, dict[str, Any]]:
        """An image and what the processor is told of its size."""
        image, size = part["image"], size_of(part)
        if size.resized is None:
            return image, self._options(size, point.max_pixels)
        # Brought to the height and width that were asked for: the processor would keep the image's aspect.
        height, width = self._resized(size, point.max_pixels)
        stretched = image.resize((width, height), Image.Resampling.BICUBIC)
        return stretched, self._options(Size(1, height, width, max_pixels=height * width), None)

    def _options(self, size: Size, max_pixels: int | None) -> dict[str, Any]:
        loaded = getattr(getattr(self.processor, "tokenizer", None), "init_kwargs", {})
        return call_options(self._processor_for(size.clip), size, max_pixels, loaded)

    def sizes(self, inputs: Mapping[str, Any]) -> list[Size]:
        patch, temporal = self._patch, self._temporal
        return [
            Size(t * temporal if kind == "video" else t, h * patch, w * patch, kind == "video", exact=True)
            for kind in KINDS
            for t, h, w in grids_of(inputs, kind)
        ]

    def thumbnails(self, inputs: Mapping[str, Any]) -> list[npt.NDArray[np.uint8]]:
        return [
            array
            for kind, (pixel_key, _, _) in KINDS.items()
            for array in unpatched(
                inputs.get(pixel_key), grids_of(inputs, kind), self._processor_for(kind == "video"), self.merge, kind
            )
        ]

    # Tensors to encoder outputs

    @torch.no_grad()
    def record(self, inputs: Mapping[str, Any], point: OperatingPoint, levels: Sequence[int]) -> Recorded:
        """See `Adapter.record`: the vision tower without its taps."""
        outputs: dict[str, Any] = {}
        kept: dict[str, Mapping[int, Tensor]] = {}
        stand: dict[str, Standing] = {}
        for kind, (pixel_key, grid_key, _) in KINDS.items():
            if inputs.get(pixel_key) is not None:
                found = self._standing(kind, inputs[pixel_key], self._merged(grids_of(inputs, kind)), point)
                with self._captured(levels) as seen:
                    out = self._encoded(kind, inputs[pixel_key], inputs[grid_key], found)
                # Nothing else of the result: it holds on to more than fusion needs.
                outputs[kind] = type(out)(pooler_output=out.pooler_output)
                kept[kind] = dict(seen)
                stand |= {kind: found} if found is not None else {}
        return Recorded(outputs, kept, stand)

    def encode(self, inputs: Mapping[str, Any], point: OperatingPoint, recorded: Recorded | None = None) -> Encoded:
        """See `Adapter.encode`. Gradient reaches the fusion module's parameters unless it is switched off."""
        point = self.computed(point)
        reduced: dict[str, Any] = dict(inputs)
        reuse = taken(reduced)
        if reuse is not None:
            reuse.count()
        outputs: dict[str, Any] = {}
        segments: dict[int, list[Segment]] = {}
        tokens = patches = 0
        for kind, (pixel_key, grid_key, id_key) in KINDS.items():
            pixels = reduced.pop(pixel_key, None)
            grids = grids_of(inputs, kind, seen=recorded is not None or reuse is not None)
            if not grids:
                continue
            merged = self._merged(grids)
            small = [pooled_grid(*grid, point.downsample) for grid in merged]
            if recorded is not None:
                out, ran = self._replayed(kind, recorded, merged, point)
            elif reuse is not None:
                out, ran = self._reused(kind, reuse, pixels, inputs[grid_key], grids, point)
            else:
                out, ran = self._features(kind, pixels, inputs[grid_key], merged, point)
            outputs[kind] = self._without_taps(self._pooled(out, merged, point))
            segments[getattr(self.model.config, id_key)] = [
                Segment(h * w, y * x) for (t, h, w), (_, y, x) in zip(merged, small, strict=True) for _ in range(t)
            ]
            thw = [(t, h * self.merge, w * self.merge) for t, h, w in small]
            reduced[grid_key] = torch.tensor(thw, dtype=inputs[grid_key].dtype, device=inputs[grid_key].device)
            tokens += sum(t * h * w for t, h, w in small)
            patches += ran
        if not outputs:
            return Encoded(reduced, 0, 0)
        reduced = shrink(reduced, segments, self.pad_token_id)
        hits = reuse.hits if reuse is not None else 0
        return Encoded({**reduced, "mm_encoder_outputs": outputs}, tokens, patches, hits)

    def _captured(self, levels: Sequence[int]) -> AbstractContextManager[dict[int, Tensor]]:
        return captured_levels(self.model.model.visual, levels) if self.taps else nullcontext({})

    def _merged(self, grids: Sequence[Grid]) -> list[Grid]:
        return [(t, h // self.merge, w // self.merge) for t, h, w in grids]

    def _standing(self, kind: str, pixels: Tensor, merged: list[Grid], point: OperatingPoint) -> Standing | None:
        """Which tokens are encoded for others as well; None where each is for itself."""
        if point.blanks is None:
            return None
        scale = torch.tensor(self._processor_for(kind == "video").image_std, device=pixels.device) * 255
        found = standing(pixels, scale, merged, self.merge, (len(scale), self._temporal, self._patch), point.blanks)
        return None if found.all else found

    def _encoded(self, kind: str, pixels: Tensor, thw: Tensor, stand: Standing | None) -> Any:
        """What the encoder gives for media of a kind; its taps, if it runs them itself, are such of what is encoded."""
        if stand is None:
            return self._encoder(kind)(pixels, thw, return_dict=True)
        tower = self.model.model.visual
        out = towers.encode(tower, pixels.type(called(tower).dtype), thw, stand)
        sizes = (thw.prod(-1) // self.merge**2).tolist()
        out.pooler_output = torch.split(stand.spread(out.pooler_output), sizes)
        if self.taps:
            out.deepstack_features = [torch.split(stand.spread(tap), sizes) for tap in out.deepstack_features]
        return out

    def _features(
        self, kind: str, pixels: Tensor, thw: Tensor, merged: list[Grid], point: OperatingPoint
    ) -> tuple[Any, int]:
        """The encoder's output, and how many patches it ran for."""
        stand = self._standing(kind, pixels, merged, point)
        lengths = self._lengths(merged, stand)
        if point.fusion == "native" or not self.taps:
            return self._encoded(kind, pixels, thw, stand), sum(lengths)
        with fused_taps(self.model.model.visual, self.fusion(point), lengths) as taps:
            out = self._encoded(kind, pixels, thw, stand)
        self._set_taps(out, taps if stand is None else [stand.spread(tap) for tap in taps], merged)
        return out, sum(lengths)

    def _lengths(self, merged: list[Grid], stand: Standing | None) -> list[int]:
        """Patches of each medium that the encoder runs for."""
        tokens = [t * h * w for t, h, w in merged] if stand is None else stand.media
        return [self.merge**2 * count for count in tokens]

    def _reused(
        self, kind: str, reuse: Reuse, pixels: Tensor, thw: Tensor, grids: list[Grid], point: OperatingPoint
    ) -> tuple[Any, int]:
        """The encoder's output, made only for the media that are not there, and how many patches it ran for."""
        rest = [index for index, one in enumerate(reuse.of(kind)) if one is None]
        own: list[Medium] = []
        ran = 0
        if rest:
            out, ran = self._features(kind, pixels, thw[rest], self._merged([grids[i] for i in rest]), point)
            # Where nothing is tapped there are zeros to show that, which need not be kept.
            taps = out.deepstack_features if self.taps and point.fusion != "top" else ()
            for place, index in enumerate(rest):
                each = tuple(tap[place] for tap in taps)
                own.append(Medium(type(out), grids[index], out.pooler_output[place], each))
        whole = reuse.keep(kind, own)
        found = whole[0].form(pooler_output=tuple(one.merged for one in whole))
        if self.taps:
            taps = [torch.cat(tap) for tap in zip(*(one.taps for one in whole), strict=True)]
            self._set_taps(found, taps, self._merged(grids))
        return found, ran

    def _replayed(self, kind: str, recorded: Recorded, merged: list[Grid], point: OperatingPoint) -> tuple[Any, int]:
        tower, fusion = called(self.model.model.visual), self.fusion(point)
        levels, source, stand = recorded.levels[kind], recorded.outputs[kind], recorded.standing.get(kind)
        lengths = self._lengths(merged, stand)
        out = type(source)(pooler_output=source.pooler_output)
        if self.taps:
            taps: list[Tensor] = []
            if fusion is not None:
                taps = [merge_tap(tower, fusion, tap, levels, lengths) for tap in range(len(self.taps))]
            elif point.fusion == "native":
                taps = [tower.deepstack_merger_list[i](levels[tap]) for i, tap in enumerate(self.taps)]
            self._set_taps(out, taps if stand is None else [stand.spread(tap) for tap in taps], merged)
        return out, sum(lengths)

    def _without_taps(self, out: Any) -> Any:
        """The same; of a model of a kind that may have taps and has none, with an empty list of them, which its forward
        pass goes through."""
        if not self.taps and getattr(out, "deepstack_features", ()) is None:
            out.deepstack_features = []
        return out

    def _set_taps(self, out: Any, taps: list[Tensor], merged: list[Grid]) -> None:
        if not taps:
            # Zeros, not an empty list: an empty list would also drop the other modality's taps.
            taps = [torch.zeros_like(torch.cat(list(out.pooler_output))) for _ in self.taps]
        device = out.pooler_output[0].device  # of the tower's end, where it is spread over several
        out.deepstack_features = [torch.split(tap.to(device), [t * h * w for t, h, w in merged]) for tap in taps]

    def _pooled(self, out: Any, grids: list[Grid], point: OperatingPoint) -> Any:
        """The encoder's output with the grid that `point` leaves of it."""
        if point.downsample == 1.0:
            return out
        taps = out.deepstack_features if self.taps else ()
        streams = [torch.cat(list(parts)) for parts in (out.pooler_output, *taps)]
        fusion = self.fusion(point)
        if fusion is None:
            pooled = [downsample(stream, grids, point.downsample) for stream in streams]
        else:
            pooled = fusion.pool([stream.to(self.device) for stream in streams], grids, point.downsample)
        small = [t * h * w for t, h, w in (pooled_grid(*grid, point.downsample) for grid in grids)]
        out.pooler_output, *smaller = (torch.split(stream, small) for stream in pooled)
        if self.taps:
            out.deepstack_features = smaller
        return out

    def _encoder(self, kind: str) -> Any:
        # Both modalities go through the same tower; get_video_features only adds arguments that do not matter here.
        return self.model.model.get_image_features if kind == "image" else self.model.model.get_video_features
