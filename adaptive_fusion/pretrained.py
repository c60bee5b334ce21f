"""A model and its processor from one place: what each option of ``from_pretrained`` means to the two.

`OPTIONS` has every option that transformers takes for either. An option that it lacks goes to the model, which
takes the fields of its configuration and no other names. Knows names and transformers' auto classes; must not
know of runners, policies or budgets.
"""

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

from adaptive_fusion.errors import ConfigError


class Goes(Enum):
    """Where an option of ``from_pretrained`` goes."""

    BOTH = "to the model and to the processor, so that they come from the same place"
    MODEL = "to the model"
    PROCESSOR = "to the processor: image processor, video processor and tokenizer"
    REFUSED = "nowhere: it is refused by name"


_CODE = "would run code from elsewhere; no remote code is executed: load the model yourself and wrap it"
_RESULT = "changes what is returned, and a runner is returned here"
_PRIVATE = "is set by transformers itself"
_FRAMES = "chooses the frames of a clip, which the runner does itself: see max_fps of a point"
_MEANING = "changes what the processor's tensors mean, which decisions are made by: load the processor yourself"
_REFUSED = {
    _CODE: "trust_remote_code code_revision use_kernels kernel_config allow_all_kernels",
    _RESULT: "output_loading_info return_unused_kwargs",
    _PRIVATE: "_commit_hash _from_auto _from_pipeline",
    _FRAMES: "do_sample_frames fps max_frames min_frames num_frames return_metadata video_metadata",
    _MEANING: "crop_size data_format default_to_square do_center_crop do_normalize do_pad do_rescale do_resize "
    "image_seq_length input_data_format merge_size pad_size patch_size rescale_factor temporal_patch_size",
}
REFUSALS: Mapping[str, str] = {name: why for why, names in _REFUSED.items() for name in names.split()}
"""Options that are refused, and why."""

_BOTH = "cache_dir force_download local_files_only proxies revision subfolder token config"
_MODEL = (
    "adapter_kwargs adapter_name attn_implementation device_map device_mesh disable_mmap distributed_config dtype "
    "experts_implementation fusion_config generation_config gguf_file ignore_mismatched_sizes key_mapping max_memory "
    "offload_buffers offload_folder quantization_config state_dict torch_dtype tp_plan tp_size tqdm_class "
    "use_safetensors variant weights_only"
)
_IMAGES = (
    "backend cap_pixels_per_frame disable_grouping do_convert_rgb image_mean image_std max_pixels max_video_tokens "
    "min_pixels resample size use_fast"
)
_TOKENS = (
    "additional_special_tokens bos_token chat_template clean_up_tokenization_spaces cls_token eos_token "
    "extra_special_tokens mask_token model_max_length pad_token padding_side sep_token split_special_tokens "
    "truncation_side unk_token"
)
OPTIONS: Mapping[str, Goes] = {
    **dict.fromkeys(_BOTH.split(), Goes.BOTH),
    **dict.fromkeys(_MODEL.split(), Goes.MODEL),
    **dict.fromkeys(f"{_IMAGES} {_TOKENS}".split(), Goes.PROCESSOR),
    **dict.fromkeys(REFUSALS, Goes.REFUSED),
}
_TAKEN = set(OPTIONS) - set(REFUSALS)
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def load_pretrained(source: str, device: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model, in eval mode on `device` if one is given, and its processor.

    Args:
        source: A folder or the id of a model on the Hub.
        device: For ``model.to``; None leaves the model where it was loaded.
        options: For transformers, by the table `OPTIONS`.

    Raises:
        ConfigError: For an option that is refused or unknown, by name.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _refuse(options, device)
    shared = {name: value for name, value in options.items() if OPTIONS.get(name) is Goes.BOTH}
    own = {name: value for name, value in options.items() if OPTIONS.get(name, Goes.MODEL) is Goes.MODEL}
    processing = {name: value for name, value in options.items() if OPTIONS.get(name) is Goes.PROCESSOR}
    # Said, not left out: left out, transformers asks on the terminal.
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=False, **shared, **own)
    except TypeError as error:
        unknown = _UNEXPECTED.search(str(error))
        if unknown is None or unknown[1] in OPTIONS:
            raise
        raise ConfigError(
            f"{unknown[1]} is no option of the model or its processor; expected one of {', '.join(sorted(_TAKEN))}, or "
            "a field of the model's configuration"
        ) from error
    if device is not None:
        model = model.to(device)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **shared, **processing)
    return model.eval(), processor


def _refuse(options: Mapping[str, Any], device: Any) -> None:
    for name, value in options.items():
        idle = value is None or (value is False and REFUSALS.get(name) in (_CODE, _RESULT))
        if name in REFUSALS and not idle:
            raise ConfigError(f"{name} is {value!r}; expected none: it {REFUSALS[name]}")
    if options.get("weights_only") is False:
        raise ConfigError("weights_only is False; expected True: nothing is unpickled here")
    attention = options.get("attn_implementation")
    if isinstance(attention, str) and "/" in attention:
        raise ConfigError(f"attn_implementation is {attention!r}; expected one of transformers' own: a kernel {_CODE}")
    if device is not None and options.get("device_map") is not None:
        raise ConfigError(f"device is {str(device)!r} and device_map {options['device_map']!r}; expected one of them")
