"""Every key that people put into messages and their parts: it changes the request, or it is refused by name.

The tables hold what qwen-vl-utils, transformers' chat templates, OpenAI's API, vLLM and Gradio know. A key that is used
must leave a trace in the request; one that is not used must be named, with its value, in the error.
"""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.execution.request import ChatRequest, build_request
from adaptive_fusion.media.clips import Video

PICTURE = Image.fromarray(np.arange(60 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 80, 3))
FRAMES = [Image.new("RGB", (48, 32), (20 * i, 0, 0)) for i in range(8)]


def encoded(image: Image.Image = PICTURE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def animation() -> bytes:
    buffer = io.BytesIO()
    FRAMES[0].save(buffer, "GIF", save_all=True, append_images=FRAMES[1:], duration=500)
    return buffer.getvalue()


TEXT64 = base64.b64encode(encoded()).decode()
DATA_URL = f"data:image/png;base64,{TEXT64}"

USED: dict[str, tuple[dict[str, Any], str, Any]] = {
    # What the part is, the key, its value.
    "image max_pixels": ({"type": "image", "image": PICTURE}, "max_pixels", 2048),
    "image min_pixels": ({"type": "image", "image": PICTURE}, "min_pixels", 20_000),
    "image detail low": ({"type": "image", "image": PICTURE}, "detail", "low"),
    "image detail high": ({"type": "image", "image": PICTURE}, "detail", "high"),
    "input_image detail": ({"type": "input_image", "image_url": DATA_URL}, "detail", "high"),
    "clip fps": ({"type": "video", "video": FRAMES}, "fps", 10),
    "clip nframes": ({"type": "video", "video": FRAMES}, "nframes", 4),
    "clip max_frames": ({"type": "video", "video": FRAMES}, "max_frames", 3),
    "clip max_pixels": ({"type": "video", "video": FRAMES}, "max_pixels", 512),
    "clip detail": ({"type": "video", "video": FRAMES}, "detail", "low"),
    "animation min_pixels": ({"type": "image", "image": animation()}, "min_pixels", 20_000),
    "animation fps": ({"type": "video", "video": animation()}, "fps", 1),
    "animation min_frames": ({"type": "video", "video": animation(), "fps": 0.5}, "min_frames", 6),
}
REFUSED: dict[str, tuple[dict[str, Any], str, Any]] = {
    f"{part['type']} {key}": (part, key, value)
    for part, keys in (
        (
            {"type": "image", "image": PICTURE},
            {
                "fps": 2.0, "total_pixels": 99_999, "video_start": 0.5, "size": {"longest_edge": 3}, "uuid": "abc",
                "cache_control": {"type": "ephemeral"}, "patch_size": 14, "file_id": "file-1",
                "media_type": "image/png", "resized_height": 64, "quality": "high", "alt_text": "a cat",
            },
        ),
        (
            {"type": "video", "video": FRAMES},
            {
                "total_pixels": 99_999, "video_start": 0.5, "video_end": 1.5, "sample_fps": 2.0, "raw_fps": 30.0,
                "num_frames": 4, "do_sample_frames": False, "video_metadata": {"fps": 30},
                "resized_width": 64, "resized_height": 64, "load_audio_from_video": True,
                "second_per_grid_ts": 1.0,
            },
        ),
        ({"type": "text", "text": "hi"}, {"cache_control": {"type": "ephemeral"}, "annotations": [{"a": 1}]}),
        ({"type": "image_url", "image_url": DATA_URL}, {"max_tokens": 5, "uuid": "abc"}),
    )
    for key, value in keys.items()
}  # fmt: skip
MESSAGE_KEYS = {
    "user": {"name": "Ann", "weight": 1, "tool_calls": [{"id": "1"}], "function_call": {"name": "f"}},
    "system": {"name": "Ann", "cache_control": {"type": "ephemeral"}},
    "assistant": {"name": "Bob", "refusal": "no", "audio": {"id": "a"}, "function_call": {"name": "f"}, "prefix": True},
    "tool": {"is_error": True, "tool_calls": [{"id": "1"}]},
}


def ask(part: Mapping[str, Any]) -> ChatRequest:
    return build_request([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], None, hashed=True)


def trace(request: ChatRequest) -> Any:
    """All that a part's options can change."""
    times = [medium.timestamps_s for medium in request.media if isinstance(medium, Video)]
    return request.sizes, times, request.full_detail


@pytest.mark.parametrize("name", USED)
def test_a_key_that_is_used_leaves_its_trace(name: str) -> None:
    part, key, value = USED[name]
    plain, asked = ask(part), ask({**part, key: value})
    assert trace(asked) != trace(plain)
    assert trace(ask({**part, key: None})) == trace(plain)  # clients write null for what was not said
    # Another view of a medium is another medium, but for a wish that concerns the decision alone.
    assert (asked.content_hash != plain.content_hash) == (value != "high")


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_is_not_used_is_refused_with_its_value(name: str) -> None:
    part, key, value = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        ask({**part, key: value})
    shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
    said = str(caught.value)
    assert key in said and shown in said, said
    assert "expected" in said or "accepted" in said


@pytest.mark.parametrize(("role", "key"), [(role, key) for role, keys in MESSAGE_KEYS.items() for key in keys])
def test_a_key_of_a_message_that_is_not_used_is_refused(role: str, key: str) -> None:
    message = {"role": role, "content": "x", key: MESSAGE_KEYS[role][key]}
    with pytest.raises(ConfigError, match=f"has {key} .*(accepted|expected)"):
        build_request([message, {"role": "user", "content": "?"}], None)


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "max_pixels": (0, -5, 1.5, True, "50176", 10**9, float("nan")),
        "fps": (0, -1, float("inf"), float("nan"), "2", True, 10**9),
        "nframes": (0, 1, 2.0, "8", 10**6),
        "detail": ("ultra", 1, True, "LOW"),
    }.items(),
)
def test_values_out_of_range_are_refused_by_name(key: str, values: tuple[Any, ...]) -> None:
    part = {"type": "video", "video": FRAMES} if key in ("fps", "nframes") else {"type": "image", "image": PICTURE}
    for value in values:
        with pytest.raises(ConfigError, match=key) as caught:
            ask({**part, key: value})
        assert repr(value)[:20] in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 2048, "min_pixels": 4096}, "min_pixels <= max_pixels"),
        ({"max_pixels": 2048, "detail": "low"}, "more than once"),
        ({"max_pixels": 2048, "resized_height": 64, "resized_width": 64}, "more than once"),
        ({"resized_height": 64_000, "resized_width": 64_000}, "at most 64000000 pixels"),
        ({"resized_height": 4000, "resized_width": 4}, "aspect"),
    ],
)
def test_options_that_rule_each_other_out_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask({"type": "image", "image": PICTURE, **options})


def test_more_frames_than_a_clip_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"nframes is 20 .* 8 frames"):
        ask({"type": "video", "video": FRAMES, "nframes": 20})
    with pytest.raises(ConfigError, match="a Video, whose frames have their times"):
        ask({"type": "video", "video": ask({"type": "video", "video": FRAMES}).media[0], "fps": 3})


def test_frames_have_the_times_of_the_rate_at_which_they_were_taken() -> None:
    for frames in (FRAMES, np.stack([np.asarray(frame) for frame in FRAMES])):
        (clip,) = ask({"type": "video", "video": frames, "fps": 10}).media
        assert isinstance(clip, Video)
        assert clip.timestamps_s == pytest.approx([i / 10 for i in range(8)]) and clip.duration_s == pytest.approx(0.8)


def lines(text: str) -> str:
    """As `base64` writes it to a terminal."""
    return "".join(f"{text[at : at + 76]}\r\n" for at in range(0, len(text), 76))


FORMS: dict[str, Callable[[Path], Any]] = {
    "OpenAI image_url": lambda _: {"type": "image_url", "image_url": {"url": DATA_URL}},
    "OpenAI image_url with detail": lambda _: {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "auto"}},
    "image_url as a string": lambda _: {"type": "image_url", "image_url": DATA_URL},
    "responses API": lambda _: {"type": "input_image", "image_url": DATA_URL, "file_id": None},
    "OpenAI file": lambda _: {"type": "file", "file": {"file_data": DATA_URL, "filename": "x.pdf"}},
    "transformers path": lambda path: {"type": "image", "path": str(path)},
    "transformers url": lambda _: {"type": "image", "url": DATA_URL},
    "transformers base64": lambda _: {"type": "image", "base64": TEXT64},
    "transformers image": lambda path: {"type": "image", "image": str(path)},
    "bytes": lambda _: {"type": "image", "image": encoded()},
    "qwen-agent": lambda path: {"image": str(path)},
    "lines of base64": lambda _: {"type": "image", "base64": lines(TEXT64)},
    "data URL in lines": lambda _: {"type": "image", "url": f" DATA:;charset=x; BASE64,{lines(TEXT64)}"},
    "escaped data URL": lambda _: {"type": "image", "url": f"data:;base64,{quote(TEXT64, safe='')}"},
    "wrong label": lambda _: {"type": "image_url", "image_url": {"url": DATA_URL.replace("image/png", "text/plain")}},
    "Gradio file": lambda path: {"type": "file", "file": {"path": str(path), "url": "http://h/f", "mime_type": "x/y"}},
    "Gradio value": lambda path: {"path": str(path), "url": None, "orig_name": "a", "size": 3, "meta": {"_type": "f"}},
    "Gradio tuple": lambda path: (str(path), None),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_media_come_in_the_forms_that_people_have(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    part = FORMS[form](path)
    for content in (part, [part], ["look:", part]):
        if content is part and not isinstance(part, tuple | dict):
            continue
        request = build_request([{"role": "user", "content": content}], "What is it?", hashed=True)
        (found,) = request.media
        assert isinstance(found, Image.Image) and found.tobytes() == PICTURE.tobytes()
        assert request.content_hash == build_request(encoded(), "?", hashed=True).content_hash
    assert build_request(part if isinstance(part, dict) else [{"path": str(path)}], "?").sizes == request.sizes


def test_clips_come_as_files_bytes_and_files_of_frames(tmp_path: Path) -> None:
    names = []
    for index, frame in enumerate(FRAMES):
        names.append(str(tmp_path / f"{index}.png"))
        frame.save(names[-1])
    clip = base64.b64encode(animation()).decode()
    for part in (
        {"type": "video", "base64": clip},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}},
        {"type": "image_url", "image_url": {"url": f"data:image/gif;base64,{clip}"}},
        {"type": "video", "video": names, "fps": 2},
    ):
        (found,) = ask(part).media
        assert isinstance(found, Video) and len(found.frames) == 8 and found.duration_s == 4


def test_strings_and_other_texts_are_said_in_order() -> None:
    content = [
        "a",
        {"type": "input_text", "text": "b"},
        {"text": "c"},
        {"type": "text", "text": "d", "annotations": []},
    ]
    assert build_request([{"role": "user", "content": content}], "e").texts == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("address", ["http://example.com/a.png", "https://h/a", "file:///etc/passwd", "/etc/passwd"])
@pytest.mark.parametrize("form", ["image_url", "nested", "url", "input_image", "video_url"])
def test_addresses_are_refused_by_name(address: str, form: str) -> None:
    part = {
        "image_url": {"type": "image_url", "image_url": address},
        "nested": {"type": "image_url", "image_url": {"url": address}},
        "url": {"type": "image", "url": address},
        "input_image": {"type": "input_image", "image_url": address},
        "video_url": {"type": "video_url", "video_url": {"url": address}},
    }[form]
    with pytest.raises(AdaptiveFusionError, match="never fetched") as caught:
        ask(part)
    assert address in str(caught.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}, "'input_audio'"),
        ({"type": "image"}, "expected its medium"),
        ({"type": "image", "path": "a", "url": "b"}, "path 'a', url 'b'"),
        ({"type": "input_image", "file_id": "file-7"}, "file_id 'file-7'"),
        ({"type": "file", "file": {"file_id": "file-7"}}, "file_id 'file-7'"),
        ({"type": "image", "base64": "!!!"}, "not valid base64"),
        ({"type": "image_url", "image_url": {"url": DATA_URL, "detail": "ultra"}}, "detail is 'ultra'"),
        ({"type": "text", "text": 5}, "text 5"),
        (("a.png", "a cat"), "'a cat'"),
        ({"type": ["image"], "image": "a.png"}, "['image']"),
        ((), "tuple of 0"),
        (7, "no known type"),
    ],
)
def test_a_part_of_no_known_form_is_refused_with_what_it_holds(part: Any, message: str) -> None:
    with pytest.raises(AdaptiveFusionError) as caught:
        ask(part)
    assert message in str(caught.value)
