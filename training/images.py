"""Images as training input: pixels as CLIP sees them, and folders of captioned images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from processing.image_processing_libra import pad_to_square, read_image

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
"""Mean colour CLIP's input is normalised with."""

CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
"""Standard deviation CLIP's input is normalised with."""


def to_pixel_values(image: Image.Image, size: int) -> torch.Tensor:
    """
    An image as CLIP sees it: padded to a square with the mean colour, resized and normalised, as by
    [`LibraImageProcessor`].

    Args:
        image (`Image.Image`): Any image; it is made upright and RGB, transparency on white.
        size (`int`): Side of the result in pixels.

    Returns:
        `torch.Tensor`: float32 of shape `(3, size, size)`, zero mean and unit variance over CLIP's training data.
    """
    image = pad_to_square(read_image(image), tuple(int(mean * 255) for mean in CLIP_MEAN))
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, dtype=np.float32) / 255.0 - CLIP_MEAN) / CLIP_STD  # (size, size, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class CaptionedFolder(torch.utils.data.Dataset):
    """
    A folder of images with captions, in the layout of `datasets`' image folders.

    Captions are the column `text` or `caption` of the folder's `metadata.jsonl` or `metadata.csv`.

    Args:
        folder (`str` or `Path`): The folder.
        split (`str`, *optional*, defaults to `"train"`): The split to read.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the metadata has no captions.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        from datasets import load_dataset

        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder. Give 'world', or a folder of images with metadata.jsonl."
            )
        self.rows = load_dataset("imagefolder", data_dir=str(folder), split=split)
        columns = [name for name in ("text", "caption") if name in self.rows.column_names]
        if not columns:
            raise ValueError(
                f"The images of {folder} have no captions: found the columns {self.rows.column_names}, expected 'text' "
                "or 'caption' in a metadata.jsonl next to the images."
            )
        self.caption_column = columns[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        """Image and caption number `index`."""
        row = self.rows[index]
        return row["image"], row[self.caption_column]
