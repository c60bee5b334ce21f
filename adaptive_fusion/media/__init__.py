"""Images and videos: decoded within limits, sampled, hashed."""

from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.hashes import content_hash
from adaptive_fusion.media.load import Media, MediaSource, kind, load_media
from adaptive_fusion.media.pixels import DEFAULT, Limits, to_rgb

__all__ = [
    "DEFAULT",
    "Limits",
    "Media",
    "MediaSource",
    "Video",
    "content_hash",
    "kind",
    "load_media",
    "to_rgb",
]
