"""Images of a request: data URIs and URLs become bytes that were seen to be an image within the limits."""

import asyncio
import base64
import binascii
from collections.abc import Collection
from io import BytesIO

from PIL import Image

from processing.image_processing_libra import read_image

from .image_urls import download_image
from .limits import ServeLimits

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP")
"""Formats of images: what browsers show. PIL reads many more, some by starting other programs."""


class ImageReader:
    """
    Reads the images that clients send or name.

    Args:
        limits ([`ServeLimits`]): of images.
        allowed_hosts (`Collection` of `str`): hosts, `name` or `name:port`, that need not be public.
    """

    def __init__(self, limits: ServeLimits, allowed_hosts: Collection[str] = ()):
        self.limits = limits
        self.allowed_hosts = frozenset(allowed_hosts)
        self._decoding = asyncio.Lock()  # an image takes much more memory than its file: one at a time

    async def read(self, url: str) -> str:
        """
        A checked copy of an image.

        Args:
            url (`str`): a base64 data URI, or an http(s) URL.

        Returns:
            `str`: a base64 data URI.

        Raises:
            ValueError: if it is neither, or the image is not to be had, not within the limits, or broken.
        """
        data = self._bytes_of(url) if url.startswith("data:") else await self._download(url)
        async with self._decoding:
            await asyncio.to_thread(self._check, data)
        return "data:image/png;base64," + base64.b64encode(data).decode()  # the type is read off the bytes anyway

    async def _download(self, url: str) -> bytes:
        return await download_image(url, self.allowed_hosts, self.limits.max_image_bytes, self.limits.image_timeout)

    def _bytes_of(self, uri: str) -> bytes:
        header, comma, text = uri.partition(",")
        if not header.startswith("data:image/") or not header.endswith(";base64") or not comma:
            raise ValueError(f"A data URI must begin with data:image/TYPE;base64, found {uri[:50]!r}.")
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"The image is no valid base64 ({error}).") from error
        if len(data) > self.limits.max_image_bytes:
            raise ValueError(f"The image has {len(data)} bytes, the most is {self.limits.max_image_bytes}.")
        return data

    def _check(self, data: bytes) -> None:
        """Reads an image as the model will, after a look at its size."""
        try:
            image = Image.open(BytesIO(data), formats=FORMATS)
        except Exception as error:  # decoders raise whatever they like on a broken file
            raise ValueError(f"The file is no image of a known format ({', '.join(FORMATS)}).") from error
        if image.width * image.height > self.limits.max_image_pixels:
            raise ValueError(
                f"The image has {image.width} x {image.height} pixels, the most is {self.limits.max_image_pixels} in all."
            )
        read_image(image)
