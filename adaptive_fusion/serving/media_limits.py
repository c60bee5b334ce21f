"""What the media of one request may be, and where they may come from.

Knows numbers and names of hosts. Must not know messages, or how media are taken.
"""

from dataclasses import dataclass

from adaptive_fusion.checks import integer, number
from adaptive_fusion.media.inline import MAX_INLINE_BYTES
from adaptive_fusion.media.pixels import DEFAULT
from adaptive_fusion.serving.fetcher import allowed_origins


@dataclass(frozen=True)
class MediaLimits:
    """What the media of one request may be, and where they may come from.

    Args:
        max_parts: Parts of all messages together, texts included.
        max_media: Images and clips among them.
        max_medium_bytes: Of one medium, encoded.
        max_request_bytes: Of all media of a request, encoded.
        max_megapixels: Of a picture or a frame, in 10^6 pixels, by its header.
        max_request_megapixels: Of all pictures and of all frames that clips may be sampled to, in 10^6 pixels as they
            are held in memory.
        allowed_domains: Hosts that media are fetched from over https: whole names or IP addresses, with a port where
            it is not 443. None by default.
        fetch_timeout_s: For all of one fetch.
        max_fetches: Fetches at a time, of all requests.
        max_decoders: Media that are decoded at a time, of all requests.

    Raises:
        ConfigError: For a value out of range.
    """

    max_parts: int = 1024
    max_media: int = 32
    max_medium_bytes: int = 32 << 20
    max_request_bytes: int = 64 << 20
    max_megapixels: float = DEFAULT.max_megapixels
    max_request_megapixels: float = 256.0
    allowed_domains: tuple[str, ...] = ()
    fetch_timeout_s: float = 5.0
    max_fetches: int = 16
    max_decoders: int = 2

    def __post_init__(self) -> None:
        for name in ("max_parts", "max_media", "max_fetches", "max_decoders"):
            integer(getattr(self, name), f"MediaLimits.{name}", 1, 1 << 20)
        for name in ("max_medium_bytes", "max_request_bytes"):
            integer(getattr(self, name), f"MediaLimits.{name}", 1, MAX_INLINE_BYTES)
        number(self.max_megapixels, "MediaLimits.max_megapixels", above=0, high=DEFAULT.max_megapixels)
        number(self.max_request_megapixels, "MediaLimits.max_request_megapixels", above=0)
        number(self.fetch_timeout_s, "MediaLimits.fetch_timeout_s", above=0, high=600)
        allowed_origins(self.allowed_domains)
        object.__setattr__(self, "allowed_domains", tuple(self.allowed_domains))  # a list would not be hashable
