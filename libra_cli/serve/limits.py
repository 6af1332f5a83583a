"""What a server grants its clients. Imports nothing heavy: the command line shows the defaults."""

from dataclasses import dataclass, field, fields


def _limit(default: int, help: str) -> int:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ServeLimits:
    """
    Limits of [`~libra_cli.serve.app.make_app`]. What exceeds one is refused with an error that names it.

    Raises:
        ValueError: if a limit is below 1.
    """

    timeout: int = _limit(120, "seconds until a request is answered, waiting included")
    max_requests: int = _limit(16, "requests at a time; answers are generated one after the other")
    max_tokens: int = _limit(1024, "tokens of an answer, also of one that asks for no number")
    max_body_bytes: int = _limit(32 * 2**20, "bytes of a request, base64 images included")
    max_parts: int = _limit(1000, "messages in a request, each counted by the parts of its content")
    max_text: int = _limit(200_000, "characters of text in a request")
    max_images: int = _limit(8, "images in a request")
    max_image_bytes: int = _limit(10 * 2**20, "bytes of an image file")
    max_image_pixels: int = _limit(40_000_000, "width times height of an image")
    image_timeout: int = _limit(10, "seconds to read a request, and to download an image")

    def __post_init__(self):
        for limit in fields(self):
            if getattr(self, limit.name) < 1:
                raise ValueError(f"{limit.name} must be at least 1, found {getattr(self, limit.name)}.")
