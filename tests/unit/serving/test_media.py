"""Media of a request: bytes and nothing else reach the core, within limits, or the library's own error says why not."""

import asyncio
import base64
import re
import ssl
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import animation, clip, encode, noise_jpeg, png_header, scene

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError, MediaRefused
from adaptive_fusion.execution.messages import read_messages
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.media.load import read_header
from adaptive_fusion.serving.fetcher import Address, Fetcher, allowed_origins
from adaptive_fusion.serving.media import check_media
from adaptive_fusion.serving.media_bytes import REASONS
from adaptive_fusion.serving.media_limits import MediaLimits

LIMITS = MediaLimits()
PICTURE = encode(scene(), "PNG")
CLIP = clip(frames=12)
HOST = "media.example.com"
TRUST = ssl.create_default_context()


def data_url(data: bytes, label: str = "image/png") -> str:
    return f"data:{label};base64,{base64.b64encode(data).decode()}"


def image(data: bytes = PICTURE, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data), **options}}


def video(data: bytes = CLIP, **options: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}, **options}


def address(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"https://{HOST}/{name}"}}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def checked(messages: Any, limits: MediaLimits = LIMITS, fetcher: Fetcher | None = None) -> list[dict[str, Any]]:
    return asyncio.run(check_media(messages, limits, fetcher=fetcher))


def sources(messages: list[dict[str, Any]]) -> list[Any]:
    return [part.source for message in read_messages(messages) for part in message.media]


class Shelf(Fetcher):
    """Hands out what lies under each name, and keeps how many were asked for at once."""

    def __init__(self, **shelf: bytes) -> None:
        super().__init__(allowed_origins([HOST]), timeout_s=1, trust=TRUST)
        self.shelf, self.now, self.most = shelf, 0, 0

    async def fetch(self, address: Address, most: int, spend: Callable[[int], None] = lambda size: None) -> bytes:
        self.now += 1
        self.most = max(self.most, self.now)
        await anyio.lowlevel.checkpoint()
        self.now -= 1
        data = self.shelf[address.target.strip("/")]
        spend(len(data))
        return data


def test_a_conversation_keeps_its_order_its_options_and_what_goes_to_the_template() -> None:
    moving = animation("GIF", [90] * 5)
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "first"}, image(detail="low"), "then", video(fps=2)]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "look"}}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "/etc/passwd"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": data_url(moving), "max_pixels": 5000}]},
    ]
    before = repr(messages)
    found = checked(messages)
    assert repr(messages) == before
    assert sources(found) == [PICTURE, CLIP, moving]
    assert found[1]["content"][1] == {"type": "image", "image": PICTURE, "detail": "low"}
    assert found[1]["content"][3] == {"type": "video", "video": CLIP, "fps": 2}
    assert found[4]["content"][0] == {"type": "image", "image": moving, "max_pixels": 5000}
    assert (found[0], found[2], found[3]) == (
        messages[0],
        {"role": "assistant", "tool_calls": messages[2]["tool_calls"]},
        messages[3],
    )
    assert [part["type"] for part in build_request(found, None).messages[1]["content"]] == [
        "text", "image", "text", "video",
    ]  # fmt: skip


def test_media_of_allowed_hosts_are_fetched_a_few_at_a_time() -> None:
    names = [f"p{n}" for n in range(9)]
    shelf = Shelf(**{name: encode(scene(40 + n), "PNG") for n, name in enumerate(names)})
    limits = MediaLimits(allowed_domains=[HOST], max_fetches=3)  # type: ignore[arg-type]
    found = checked(user(*map(address, names)), limits, shelf)
    assert sources(found) == [shelf.shelf[name] for name in names] and shelf.most == 3


TEXTS_THAT_ARE_NO_MEDIA = [
    "/etc/passwd", "etc/passwd", "../secret.png", "~/.ssh/id_rsa", "C:\\secret.png", "\\\\host\\share\\a.png",
    "file:///etc/passwd", "FILE:/etc/passwd", "http://media.example.com/a.png", "https://other.example.com/a.png",
    "ftp://media.example.com/a.png", "s3://bucket/a.png", "iVBORw0KGgo=", "", " ", "\0", "data", "blob:x", "-", ".",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS_THAT_ARE_NO_MEDIA)
@pytest.mark.parametrize("domains", [(), (HOST,)])
def test_a_text_that_is_no_data_url_and_no_allowed_address_is_refused(text: str, domains: tuple[str, ...]) -> None:
    for part in (
        {"type": "image_url", "image_url": text},
        {"type": "image_url", "image_url": {"url": text, "detail": "low"}},
        {"type": "video_url", "video_url": {"url": text}},
    ):
        with pytest.raises(MediaRefused) as caught:
            checked(user(part), MediaLimits(allowed_domains=domains))
        assert caught.value.reason == "address" and str(caught.value).startswith("messages[0].content[0]: ")
        assert not re.search(r"passwd|secret|example\.com|bucket", str(caught.value))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "/etc/passwd"}, {"type": "image", "path": "/etc/passwd"}, {"path": "/etc/passwd"},
        {"type": "video", "video": ["/etc/passwd"]}, {"type": "media", "media": "/etc/passwd"},
        {"type": "file", "file": {"path": "/etc/passwd"}}, {"type": "file", "file": {"file_data": "data:,"}},
        {"type": "image_url", "image_url": {"path": "/etc/passwd"}}, {"image_url": "/etc/passwd"}, ("/etc/passwd",),
        {"type": "image_url", "path": "/etc/passwd"}, {**image(), "path": "/etc/passwd"},
        {**image(), "image": "/etc/passwd"}, {"type": "image_url", "image_url": [data_url(PICTURE)]},
        {"type": "image_url", "image_url": {"url": {"url": data_url(PICTURE)}}}, {"type": "image_url"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, {"type": "audio_url", "audio_url": "x"},
        {"type": "input_image", "image_url": data_url(PICTURE)}, {"type": "refusal", "refusal": "no"},
        {"type": ["text"]}, {"type": None}, {1: 2}, 5, None, True, b"bytes", ["text"],
        {"type": "text"}, {"type": "text", "text": 5}, {"type": "text", "text": "a", "cache_control": {"type": "x"}},
        {"type": "text", "text": "\ud800"}, image(detail="medium"), image(detail="x" * 9999), video(fps=float("nan")),
        image(**{"x" * 9999: 1}), video(fps=10**5000), video(nframes=-1), video(nframes=2, fps=1), image(fps=2),
        {**image(detail="low"), "detail": "low"}, video(total_pixels=5), {**image(), "max_pixels": {"a": 1}},
    ],
)  # fmt: skip
def test_a_part_of_another_form_is_refused_by_name_and_never_a_path(part: Any) -> None:
    with pytest.raises(ConfigError, match=r"^messages\[0\]\.content\[0\]") as caught:
        checked(user(part))
    assert len(str(caught.value)) < 400 and "/etc" not in str(caught.value)


@pytest.mark.parametrize("content", [{"path": "/etc/passwd"}, ("/etc/passwd",), b"/etc/passwd", 5])
def test_content_of_another_form_is_refused_and_never_a_path(content: Any) -> None:
    with pytest.raises(ConfigError, match=r"^messages\[0\]\.content"):
        checked([{"role": "user", "content": content}])


def test_a_message_of_another_form_is_refused() -> None:
    for message in (["user", "hi"], "hi", None, {1: 2}):
        with pytest.raises(ConfigError, match=r"^messages\[1\] is "):
            checked([{"role": "user", "content": "hi"}, message])


BAD: dict[str, tuple[str, Callable[[], list[Any]], MediaLimits]] = {
    "too many media": ("count", lambda: [image()] * 3, MediaLimits(max_media=2)),
    "too long a data URL": ("size", lambda: [image(bytes(2000))], MediaLimits(max_medium_bytes=1000)),
    "too large a medium": ("encoding", lambda: [image(bytes(1100))], MediaLimits(max_medium_bytes=1000)),
    "too long data URLs": ("size", lambda: [image(bytes(30_000))] * 3, MediaLimits(max_request_bytes=50_000)),
    "too large media": ("size", lambda: [image(noise_jpeg())] * 2, MediaLimits(max_request_bytes=len(noise_jpeg()))),
    "too large fetched media": ("size", lambda: [address("a"), image()], MediaLimits(max_request_bytes=len(PICTURE))),
    "no base64": ("encoding", lambda: [{"type": "image_url", "image_url": "data:image/png,AAAA"}], LIMITS),
    "base64 of another alphabet": (
        "encoding", lambda: [{"type": "image_url", "image_url": "data:;base64,iVBORw-_"}], LIMITS
    ),
    "base64 that is cut": ("encoding", lambda: [{"type": "image_url", "image_url": "data:;base64,iVBOR"}], LIMITS),
    "no medium": ("header", lambda: [image(b"#EXTM3U\nfile:///etc/passwd")], LIMITS),
    "SVG": ("header", lambda: [image(b"<svg xmlns='http://www.w3.org/2000/svg'/>")], LIMITS),
    "a bomb": ("header", lambda: [image(png_header(20_000, 20_000))], LIMITS),
    "too large a picture": ("header", lambda: [image(png_header(2000, 1000))], MediaLimits(max_megapixels=1)),
    "too large a frame": ("header", lambda: [video(clip(size=(640, 480)))], MediaLimits(max_megapixels=0.2)),
    "too narrow a picture": ("header", lambda: [image(png_header(100_000, 3))], LIMITS),
    "a broken clip": ("header", lambda: [video(CLIP[:200])], LIMITS),
    "too many pixels": ("pixels", lambda: [image(png_header(8000, 8000))] * 5, LIMITS),
    "too many frames": ("pixels", lambda: [video(), video(nframes=700)], MediaLimits(max_request_megapixels=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_media_beyond_the_limits_are_refused_with_a_reason(name: str) -> None:
    reason, parts, limits = BAD[name]
    with pytest.raises(MediaRefused) as caught:
        checked(user(*parts()), MediaLimits(**{**vars(limits), "allowed_domains": (HOST,)}), Shelf(a=PICTURE))
    assert caught.value.reason == reason and reason in REASONS
    assert len(str(caught.value)) < 400 and not re.search(r"passwd|w3\.org| at 0x|site-packages", str(caught.value))


def test_what_is_just_within_the_limits_passes() -> None:
    exact = MediaLimits(max_parts=3, max_media=2, max_medium_bytes=len(PICTURE), max_request_bytes=2 * len(PICTURE))
    assert sources(checked(user("look", image(), image()), exact)) == [PICTURE, PICTURE]
    with pytest.raises(ConfigError, match="more than 3 parts"):
        checked(user("look", "here", image(), image()), exact)
    assert checked(user(video(nframes=4)), MediaLimits(max_request_megapixels=4 * 64 * 48 / 1e6))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_media", 0), ("max_parts", 1.5), ("max_medium_bytes", 1 << 40), ("max_request_bytes", -1),
     ("max_megapixels", 65), ("max_request_megapixels", float("nan")), ("fetch_timeout_s", 0), ("max_decoders", True),
     ("allowed_domains", ("*",)), ("allowed_domains", "example.com")],
)  # fmt: skip
def test_limits_refuse_absurd_values(field: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        MediaLimits(**{field: value})


def test_a_header_says_what_the_whole_medium_turns_out_to_be() -> None:
    for data, expected in (
        (PICTURE, ("image", 48, 32)), (noise_jpeg(), ("image", 80, 60)), (encode(scene(), "TIFF"), ("image", 48, 32)),
        (CLIP, ("video", 64, 48)), (animation("GIF", [90] * 5), ("video", 20, 10)),
        (animation("WEBP", [90] * 5), ("video", 20, 10)), (animation("PNG", [90]), ("image", 20, 10)),
        (clip("webm", "libvpx-vp9", frames=10), ("video", 64, 48)),
    ):  # fmt: skip
        assert read_header(data) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(data_url(PICTURE)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "url", "image_url", "video_url", "path", "image", "fps"]
            )
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
MEDIA = st.sampled_from([PICTURE, CLIP[:300], noise_jpeg()[:-20], b"", b"GIF89a", b"/etc/passwd"])
URLS = (
    st.sampled_from([*TEXTS_THAT_ARE_NO_MEDIA, f"https://{HOST}/a"])
    | MEDIA.map(data_url)
    | st.text(max_size=9).map("data:image/png;base64,{}".format)
    | JSON
)
PARTS = (
    JSON
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": URLS})
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["image_url", "video_url"]), "image_url": st.fixed_dictionaries({"url": URLS})},
        optional={"detail": JSON, "fps": JSON, "max_pixels": JSON, "video_url": URLS, "path": JSON},
    )
    | st.fixed_dictionaries({"type": st.just("text"), "text": JSON})
)
MESSAGES = st.lists(
    JSON | st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(PARTS, max_size=3) | JSON}), max_size=3
)


@settings(max_examples=150, deadline=None)
@given(MESSAGES)
def test_any_messages_end_in_bytes_or_in_the_librarys_own_error(messages: list[Any]) -> None:
    try:
        found = checked(messages, MediaLimits(allowed_domains=(HOST,)), Shelf(a=PICTURE))
        assert all(isinstance(source, bytes) for source in sources(found))
    except AdaptiveFusionError as error:
        assert not re.search(r"/etc/|site-packages| at 0x", str(error)) and isinstance(
            error, MediaRefused | ConfigError
        )
