"""What visitors bring: images within limits, and explanations where they are not."""

import os
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_FILE_SIZE = "10mb"
"""Largest upload; the server refuses more while it comes in."""

MAX_PIXELS = 40_000_000
"""Most pixels of an image, read from its header before anything is decoded. Photos of phones have 12 to 50 million."""

MAX_SIDE = 1024
"""Longer side to which images are shrunk at once; models read 96 or 336 pixels."""


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is read. Of the others, some start programs (EPS) or name further files."""


class VisitorError(ValueError):
    """A mistake of the visitor; the message says what was wrong and what to do, in words for the page."""


def open_image(path: str | os.PathLike | None) -> Image.Image:
    """
    An uploaded image, upright RGB on white, at most `MAX_SIDE` pixels on its longer side.

    Args:
        path (`str` or `os.PathLike`, *optional*): file that gradio keeps for the visitor. Of an animation: its first frame.

    Returns:
        `PIL.Image.Image`: a copy in memory, mode RGB.

    Raises:
        VisitorError: if there is none, it is no image, too large, or broken.
    """
    if path is None:
        raise VisitorError("There is no image yet. Upload one, paste one, or pick an example.")
    name = Path(path).name
    if not os.path.isfile(path):
        raise VisitorError(f"{name} is no longer here: uploads are deleted after a while. Please upload it again.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise VisitorError(
                    f"{name} has {image.width} x {image.height} pixels. At most {MAX_PIXELS // 10**6} million can be read "
                    "here: please make it smaller."
                )
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # JPEGs: decode no more than needed
            image.load()
            upright = ImageOps.exif_transpose(image)
            upright.thumbnail((MAX_SIDE, MAX_SIDE))
            return _on_white(upright)
    except VisitorError:
        raise
    except Image.DecompressionBombError as error:  # so large that PIL refuses by itself
        raise VisitorError(
            f"{name} has far too many pixels: at most {MAX_PIXELS // 10**6} million can be read here."
        ) from error
    except UnidentifiedImageError as error:
        raise VisitorError(f"{name} is not an image that can be read here. PNG, JPEG, WebP and GIF work.") from error
    except Exception as error:  # decoders raise whatever they like on a broken file
        raise VisitorError(f"{name} is broken or cut short: it cannot be read as an image.") from error


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
