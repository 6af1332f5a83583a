"""Image processor of Libra: any image in, the square normalized pixels CLIP reads out; and decoded pixels back to PIL.

The preprocessing is that of the authors' release: RGB, padding to a square with CLIP's mean color, then CLIP's own
resize, crop, rescale and normalization.
"""

import base64
import binascii
import os
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

DOWNLOAD_TIMEOUT = 60
"""Seconds without an answer after which a download fails."""

MAX_SIDE = 12_000
"""Longest side of an image in pixels. A padded image takes a square of it: 3 bytes a pixel, 432 MB at most."""

MAX_BYTES = 500 * 2**20
"""Largest image file, on disk or downloaded."""

MULTI_PICTURE_PHOTO = "MPO"
"""Photos of many phones: JPEGs that carry auxiliary pictures after the photo itself. Not an animation."""


def read_image(image: Any, name: str = "image") -> Image.Image:
    """An upright RGB image of whatever the user has.

    Args:
        image (`str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A path, an http(s) URL, a base64 string or data URI, a PIL image, or an array (h, w), (h, w, c) or
            (c, h, w) with 1, 3 or 4 channels, integers in [0, 255], floats in [0, 1] or booleans. PIL images of the modes I
            and F are read as such arrays.
        name (`str`, *optional*, defaults to `"image"`): What to call the image in errors.

    Returns:
        `PIL.Image.Image`: Mode RGB, EXIF orientation applied, transparency composited on white.

    Raises:
        `ValueError`: If the image cannot be read, has no pixels or too many (a side longer than `MAX_SIDE`, a file larger
            than `MAX_BYTES`; refused before it is decoded), or is an animation.
        `TypeError`: If `image` is of another type.
    """
    if isinstance(image, (str, os.PathLike)):
        image, name = _open_image(image, name)
    elif isinstance(image, (np.ndarray, Tensor)):
        image = _image_of_array(image, name)
    elif not isinstance(image, Image.Image):
        raise TypeError(f"{name}: expected a path, a URL, a PIL image or an array, got {type(image).__name__}.")
    if 0 in image.size:
        raise ValueError(f"{name}: the image has no pixels ({image.width} x {image.height}).")
    if max(image.size) > MAX_SIDE:  # known from the header; what a small file unpacks to can fill any memory
        raise ValueError(
            f"{name}: the image has {image.width} x {image.height} pixels; at most {MAX_SIDE} on a side. Resize it first."
        )
    if getattr(image, "is_animated", False) and image.format != MULTI_PICTURE_PHOTO:
        raise ValueError(
            f"{name}: a {image.format} with {image.n_frames} frames. Pass one frame: image.seek(i); image.convert('RGB')."
        )
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode not in ("F", "I"):
            return _to_rgb(image)
        array = np.asarray(image)
    except Exception as error:  # decoders raise whatever they like on a broken file
        raise ValueError(f"{name}: the image data is broken or cut short ({error}).") from error
    return _to_rgb(_image_of_array(array, name))  # of any range: PIL would cut it off at 255


def _open_image(source: str | os.PathLike, name: str) -> tuple[Image.Image, str]:
    """The still undecoded image behind a path, URL or base64 string, and its name for errors."""
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        name, data = text, _download(text)
    elif text.startswith("data:"):
        data = _decode_base64(text.partition(",")[2], name)
    elif os.path.isfile(text):
        if os.path.getsize(text) > MAX_BYTES:
            raise ValueError(f"{text}: the image file has {os.path.getsize(text)} bytes; at most {MAX_BYTES}.")
        name, data = text, Path(text).read_bytes()
    elif isinstance(source, os.PathLike) or len(text) < 1024:  # too short for an image: a path that does not exist
        raise ValueError(f"{name}: there is no image file {text!r}.")
    else:
        data = _decode_base64(text, name)
    if not data:
        raise ValueError(f"{name}: the image file is empty (0 bytes).")
    try:
        return Image.open(BytesIO(data)), name
    except Exception as error:  # unknown formats, bombs, broken headers
        raise ValueError(f"{name}: not a readable image ({error}).") from error


def _download(url: str) -> bytes:
    # The standard library's client: which one is installed beside transformers differs between its versions.
    request = Request(url, headers={"User-Agent": "libra"})  # some sites refuse Python's own name
    try:
        with urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
            data = response.read(MAX_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{url}: the image cannot be downloaded ({error}).") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{url}: the image file has more than {MAX_BYTES} bytes.")
    return data


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: neither an image file nor valid base64 ({error}).") from error


def _image_of_array(array: np.ndarray | Tensor, name: str) -> Image.Image:
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
    if array.ndim == 2:
        array = array[..., None]  # (h, w, 1)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)  # (h, w, c)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{name}: expected an array (h, w), (h, w, c) or (c, h, w), got shape {array.shape}.")
    if 0 in array.shape:
        raise ValueError(f"{name}: the image has no pixels (array of shape {array.shape}).")
    top = 1 if array.dtype == bool or np.issubdtype(array.dtype, np.floating) else 255
    if not (array.min() >= 0 and array.max() <= top):  # also when NaN
        raise ValueError(
            f"{name}: {array.dtype} pixels must be in [0, {top}], got values from {array.min()} to {array.max()}."
        )
    pixels = np.round(array * (255 / top)).astype(np.uint8)  # (h, w, c)
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16 bit grayscale: PIL would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image centered on a square of its longer side, filled with `color`."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class LibraImageProcessor(PilBackend):
    r"""
    Image processor of Libra, with the arguments of CLIP's.

    Images may be paths, URLs, base64 strings, PIL images, arrays, or (nested) lists of these. They are always made
    upright RGB (transparency on white) and padded to a square with the mean color, each channel `int(mean * 255)`.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 336}`): Size after resizing.
        crop_size (`dict[str, int]`, *optional*, defaults to `{"height": 336, "width": 336}`): Size after cropping.
        image_mean (`tuple[float]`, *optional*, defaults to CLIP's): Mean color.
        image_std (`tuple[float]`, *optional*, defaults to CLIP's): Standard deviation of the colors.

    Example:

    ```python
    >>> image_processor(["photo.jpg"], return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 336, 336])
    ```
    """

    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def fetch_images(self, images: Any, name: str = "images") -> Any:
        """Reads every image of a (nested) list with [`read_image`].

        Returns:
            The same nesting with upright RGB `PIL.Image.Image`s; an array (n, h, w, c) or (n, c, h, w) becomes a list.

        Raises:
            `ValueError`: If an image cannot be used; the message names the file or the position in the lists.
        """
        is_batch = isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4
        if isinstance(images, (list, tuple)) or is_batch:
            return [self.fetch_images(image, f"{name}[{index}]") for index, image in enumerate(images)]
        return read_image(images, name)

    def process_image(self, image: Any, *args, image_mean=None, **kwargs) -> np.ndarray:
        """Pads an image as read by [`read_image`] to a square; uint8 array (3, side, side)."""
        color = tuple(int(mean * 255) for mean in image_mean or self.image_mean)
        return np.moveaxis(np.asarray(pad_to_square(image, color)), -1, 0)

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Preprocessed pixels on the scale of the decoder: what a reconstruction is compared with.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, h, w)`): Output of this processor.

        Returns:
            `torch.Tensor` of shape `(n, 3, h, w)`: The same pixels in [-1, 1], -1 black and 1 white.
        """
        mean = torch.tensor(self.image_mean, device=pixel_values.device, dtype=pixel_values.dtype)[:, None, None]
        std = torch.tensor(self.image_std, device=pixel_values.device, dtype=pixel_values.dtype)[:, None, None]
        return 2 * (pixel_values * std + mean) - 1

    def postprocess(self, pixels: Tensor) -> list[Image.Image]:
        """PIL images of decoded pixels (n, 3, h, w) in nominally [-1, 1]; values outside are clamped."""
        rounded = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # (n, 3, h, w)
        return [Image.fromarray(image) for image in rounded.permute(0, 2, 3, 1).cpu().numpy()]


__all__ = ["LibraImageProcessor"]
