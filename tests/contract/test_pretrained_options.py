"""Every option of ``from_pretrained`` is decided on: to the model, to the processor, to both, or refused by name.

What the installed transformers takes is read from it; an option that a later one brings fails here until it stands in
`adaptive_fusion.pretrained.OPTIONS`.
"""

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.processing_utils import ImagesKwargs, ProcessorMixin, VideosKwargs
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.hub import DownloadKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.models import Size
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.pretrained import OPTIONS, REFUSALS, Goes, load_pretrained
from adaptive_fusion.reference import model_path
from adaptive_fusion.runner import AdaptiveRunner

READERS = (
    PreTrainedModel.from_pretrained,
    _BaseAutoModelClass.from_pretrained,
    AutoProcessor.from_pretrained,
    ProcessorMixin.from_pretrained,
    ProcessorMixin.get_processor_dict,
    ImageProcessingMixin.from_pretrained,
    BaseVideoProcessor.from_pretrained,
)
NOT_AT_LOADING = {
    "device": "the runner's own: where the model goes",
    "return_tensors": "of a call of the processor: the runner needs tensors of torch",
    "repo_type": "read for other repositories than models",
    "user_agent": "set by transformers",
    "force_resize": "of no loading",
}


def installed(processor: Any) -> set[str]:
    """Every option that the installed transformers reads when it loads a model and its processor."""
    found = set(DownloadKwargs.__annotations__)
    for method in READERS:
        kinds = inspect.signature(method).parameters.values()
        found |= {p.name for p in kinds if p.kind is inspect.Parameter.KEYWORD_ONLY or p.default is not p.empty}
        found |= set(re.findall(r"kwargs\.(?:pop|get)\(\"(\w+)\"", inspect.getsource(method)))
    for kind in (ImagesKwargs, VideosKwargs, *(type(p).valid_kwargs for p in parts(processor))):
        found |= {
            name
            for base in (kind, *getattr(kind, "__orig_bases__", ()))
            for name in getattr(base, "__annotations__", ())
        }
    found |= set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
    return found - set(NOT_AT_LOADING)


def parts(processor: Any) -> tuple[Any, Any]:
    return processor.image_processor, processor.video_processor


def test_every_option_of_the_installed_transformers_is_decided_on(processor: Any) -> None:
    assert sorted(installed(processor) - set(OPTIONS)) == []


@pytest.mark.parametrize("name", sorted(name for name, goes in OPTIONS.items() if goes is Goes.REFUSED))
def test_refused_options_are_named_and_idle_values_are_not(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is True; expected none: it {re.escape(REFUSALS[name])}"):
        AdaptiveRunner.from_pretrained("reference", **{name: True})
    load_pretrained(str(model_path()), None, {name: None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_only": False}, "weights_only is False; expected True"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "expected one of transformers' own"),
        ({"device": "cpu", "device_map": "cpu"}, "device is 'cpu' and device_map 'cpu'; expected one of them"),
    ],
)
def test_values_that_run_code_or_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptiveRunner.from_pretrained("reference", **options)


def test_what_neither_knows_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"max_pixel is no option .*expected one of .* max_pixels, "):
        AdaptiveRunner.from_pretrained("reference", max_pixel=4096)


# The same place for both


def altered(folder: Path, pixels: int) -> Path:
    """The reference model with another limit of pixels, by which its processor is known, and another bias."""
    shutil.copytree(model_path(), folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.exists():
            path.write_text(re.sub(r'("longest_edge": )\d+', rf"\g<1>{pixels}", path.read_text()))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"model_type"', f'"mark": {pixels}, "model_type"', 1))
    return folder


def found(runner: AdaptiveRunner) -> tuple[int, int]:
    """By model and processor, which of the altered models they are."""
    return runner.adapter.model.config.mark, runner.processor.image_processor.size["longest_edge"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two revisions of one model, as the Hub's client lays it out."""
    cache = tmp_path_factory.mktemp("hub")
    repo = cache / "models--somebody--screens"
    for mark, (branch, commit) in enumerate((("main", "a" * 40), ("tried", "b" * 40)), 1):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
        altered(repo / "snapshots" / commit, mark * 4096)
    return cache


@pytest.mark.parametrize(("revision", "mark"), [(None, 1), ("main", 1), ("tried", 2), ("b" * 40, 2)])
def test_model_and_processor_come_from_the_same_revision(revision: str | None, mark: int, hub: Path) -> None:
    options = {} if revision is None else {"revision": revision}
    runner = AdaptiveRunner.from_pretrained("somebody/screens", cache_dir=hub, local_files_only=True, **options)
    assert found(runner) == (mark * 4096, mark * 4096)


def test_model_and_processor_come_from_the_same_subfolder(tmp_path: Path) -> None:
    altered(tmp_path / "whole", 4096)
    altered(tmp_path / "whole" / "inner", 8192)
    assert found(AdaptiveRunner.from_pretrained(tmp_path / "whole")) == (4096, 4096)
    runner = AdaptiveRunner.from_pretrained(
        tmp_path / "whole", subfolder="inner", token=False, force_download=False, proxies=None
    )
    assert found(runner) == (8192, 8192)


# To one of them

TO_PROCESSOR: dict[str, tuple[Any, Any]] = {
    "max_pixels": (8192, lambda p: p.image_processor.size["longest_edge"]),
    "min_pixels": (2048, lambda p: p.image_processor.size["shortest_edge"]),
    "size": ({"shortest_edge": 1024, "longest_edge": 8192}, lambda p: dict(p.image_processor.size)),
    "image_mean": ([0.1, 0.2, 0.3], lambda p: list(p.image_processor.image_mean)),
    "padding_side": ("right", lambda p: p.tokenizer.padding_side),
    "chat_template": ("{{ messages }}", lambda p: p.chat_template),
    "use_fast": (False, lambda p: "pil" not in type(p.image_processor).__name__.lower()),
}


@pytest.mark.parametrize("name", TO_PROCESSOR)
def test_options_of_the_processor_reach_it(name: str) -> None:
    value, read = TO_PROCESSOR[name]
    expected = read(AutoProcessor.from_pretrained(model_path(), **{name: value}))
    assert expected != read(AutoProcessor.from_pretrained(model_path()))
    assert read(AdaptiveRunner.from_pretrained("reference", **{name: value}).processor) == expected


LIMITS: list[dict[str, Any]] = [
    {"max_pixels": 8192},
    {"size": {"shortest_edge": 1024, "longest_edge": 8192}},
    {"cap_pixels_per_frame": True, "max_video_tokens": 6},
]


@pytest.mark.parametrize("options", LIMITS)
@pytest.mark.parametrize("point", [NATIVE, OperatingPoint(max_pixels=4096), OperatingPoint("gated", 6, 0.5)])
def test_pixel_limits_of_the_processor_are_planned_and_kept(
    options: dict[str, Any], point: OperatingPoint, noise_image: Any, clip: Any
) -> None:
    runner = AdaptiveRunner.from_pretrained("reference", **options)
    content = [{"type": "image", "image": noise_image(320, 256)}, {"type": "video", "video": clip}]
    inputs = runner.adapter.prepare([{"role": "user", "content": content}], point)
    image, video = runner.adapter.sizes(inputs)
    most = 8192 if "max_video_tokens" not in options else 1 << 20
    assert image.height * image.width <= min(most, point.max_pixels or most)
    planned = runner.adapter.plan([Size(1, 256, 320), Size(*clip.frames.shape[:3], clip=True)], point)
    assert planned.patches == runner.adapter.plan([image, video], point).patches


def test_options_of_the_model_reach_it() -> None:
    runner = AdaptiveRunner.from_pretrained("reference", dtype=torch.bfloat16, attn_implementation="eager")
    assert runner.dtype == torch.bfloat16 and runner.model.config._attn_implementation == "eager"
    assert not runner.model.training
    assert (
        AdaptiveRunner.from_pretrained("reference", tie_word_embeddings=False).model.config.tie_word_embeddings is False
    )
