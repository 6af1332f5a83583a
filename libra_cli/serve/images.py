"""Images of a request: data URIs and URLs become pictures that are within the limits, and no larger than is of use."""

import asyncio
import base64
from collections.abc import Collection
from concurrent.futures import Executor
from io import BytesIO

from PIL import Image

from processing.image_processing_libra import read_image

from .image_urls import download_image
from .limits import ServeLimits

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP")
"""Formats of images: what browsers show. PIL reads many more, some by starting other programs."""

SHRUNK_FIRST = ("L", "LA", "RGB", "RGBA")
"""Modes whose pixels can be averaged as they are. Made upright and opaque first, they take six times their memory."""


class ImageReader:
    """
    Reads the images that clients send or name.

    Args:
        limits ([`ServeLimits`]): of images.
        max_side (`int`): longest side of what is handed on; larger images are shrunk to it. The processor pads every
            image of a request to a square, and holds all of these at once.
        worker (`Executor`): decodes, one image at a time: an image takes much more memory than its file.
        allowed_hosts (`Collection` of `str`, *optional*, defaults to none): hosts, `name` or `name:port`, that need not
            be public.
    """

    def __init__(self, limits: ServeLimits, max_side: int, worker: Executor, allowed_hosts: Collection[str] = ()):
        self.limits = limits
        self.max_side = max_side
        self.worker = worker
        self.allowed_hosts = frozenset(allowed_hosts)

    async def read(self, url: str) -> Image.Image:
        """
        The image behind a URL.

        Args:
            url (`str`): a base64 data URI, or an http(s) URL.

        Returns:
            `PIL.Image.Image`: upright, RGB, at most `max_side` pixels on a side.

        Raises:
            ValueError: if it is neither, or the image is not to be had, not within the limits, or broken.
        """
        data = self._bytes_of(url) if url.startswith("data:") else await self._download(url)
        return await asyncio.get_running_loop().run_in_executor(self.worker, self._decode, data)

    async def _download(self, url: str) -> bytes:
        return await download_image(url, self.allowed_hosts, self.limits.max_image_bytes, self.limits.image_timeout)

    def _bytes_of(self, uri: str) -> bytes:
        header, comma, text = uri.partition(",")
        if not header.startswith("data:image/") or not header.endswith(";base64") or not comma:
            raise ValueError(f"A data URI must begin with data:image/TYPE;base64, found {uri[:50]!r}.")
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError as error:  # binascii's, or of characters beyond ASCII
            raise ValueError(f"The image is no valid base64 ({error}).") from error
        if len(data) > self.limits.max_image_bytes:
            raise ValueError(f"The image has {len(data)} bytes, the most is {self.limits.max_image_bytes}.")
        return data

    def _decode(self, data: bytes) -> Image.Image:
        """Reads an image as the model will, after a look at its size."""
        try:
            image = Image.open(BytesIO(data), formats=FORMATS)
        except Exception as error:  # decoders raise whatever they like on a broken file
            raise ValueError(f"The file is no image of a known format ({', '.join(FORMATS)}).") from error
        if image.width * image.height > self.limits.max_image_pixels:
            raise ValueError(
                f"The image has {image.width} x {image.height} pixels, the most is {self.limits.max_image_pixels} in all."
            )
        if image.mode in SHRUNK_FIRST and "transparency" not in image.info:
            self._shrink(image)
        picture = read_image(image)
        self._shrink(picture)
        return picture

    def _shrink(self, image: Image.Image) -> None:
        try:
            image.thumbnail((self.max_side, self.max_side))
        except Exception as error:  # this decodes
            raise ValueError(f"The image data is broken or cut short ({error}).") from error
