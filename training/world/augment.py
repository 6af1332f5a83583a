"""Random changes of an icon's shape and colours, so that a model learns the thing and not one vendor's style."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Augmentation:
    """
    How strongly icons are changed. All off means no change.

    Args:
        rotation (`float`, *optional*, defaults to 0.0): Largest rotation in degrees, either way.
        shear (`float`, *optional*, defaults to 0.0): Largest shear, as a fraction of the side.
        stretch (`float`, *optional*, defaults to 0.0): Largest change of the aspect ratio, as a fraction.
        colour (`float`, *optional*, defaults to 0.0): Strength in [0, 1] of changes of hue, saturation, contrast and
            brightness.
        gray (`float`, *optional*, defaults to 0.0): Probability that an icon loses its colours.
        blur (`float`, *optional*, defaults to 0.0): Probability of a slight blur.
    """

    rotation: float = 0.0
    shear: float = 0.0
    stretch: float = 0.0
    colour: float = 0.0
    gray: float = 0.0
    blur: float = 0.0

    def __call__(self, icon: Image.Image, rng: np.random.Generator) -> Image.Image:
        """
        Change one icon.

        Args:
            icon (`Image.Image`): RGBA image.
            rng (`np.random.Generator`): Source of randomness.

        Returns:
            `Image.Image`: RGBA image of the same size.
        """
        if self.rotation or self.shear or self.stretch:
            icon = self._warp(icon, rng)
        if self.colour or self.gray:
            icon = self._recolour(icon, rng)
        if self.blur and rng.random() < self.blur:
            icon = icon.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
        return icon

    def _warp(self, icon: Image.Image, rng: np.random.Generator) -> Image.Image:
        angle = np.deg2rad(rng.uniform(-self.rotation, self.rotation))
        stretch = np.exp(rng.uniform(-self.stretch, self.stretch) / 2)
        rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shear = np.array([[1.0, rng.uniform(-self.shear, self.shear)], [rng.uniform(-self.shear, self.shear), 1.0]])
        matrix = rotate @ shear @ np.diag([stretch, 1 / stretch])  # from output pixels to input pixels
        matrix *= max(1.0, np.abs(np.linalg.inv(matrix)).sum(1).max() * 0.9)  # corners stay roughly inside
        centre = np.array([icon.width / 2, icon.height / 2])
        offset = centre - matrix @ centre
        data = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
        return icon.transform(icon.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)

    def _recolour(self, icon: Image.Image, rng: np.random.Generator) -> Image.Image:
        pixels = np.asarray(icon)
        colours = pixels[..., :3].reshape(-1, 3).astype(np.float32)  # (height * width, 3)
        matrix = self._colour_matrix(rng)
        colours = (colours - 128.0) @ matrix.T + (128.0 + 40.0 * self.colour * rng.uniform(-1, 1))
        changed = np.empty_like(pixels)
        changed[..., :3] = colours.clip(0, 255).reshape(*pixels.shape[:2], 3)
        changed[..., 3] = pixels[..., 3]
        return Image.fromarray(changed)

    def _colour_matrix(self, rng: np.random.Generator) -> np.ndarray:
        """A 3 x 3 matrix: a rotation about the gray axis (hue), then saturation and contrast."""
        to_gray = np.outer(np.ones(3), _LUMA)
        if rng.random() < self.gray:
            return (to_gray * rng.uniform(0.7, 1.2)).astype(np.float32)
        spread = 0.35 if rng.random() < 0.8 else np.pi  # mostly slight, sometimes any hue
        hue = self.colour * rng.uniform(-spread, spread)
        axis = np.full(3, 3**-0.5)
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        rotation = np.eye(3) + np.sin(hue) * cross + (1 - np.cos(hue)) * (cross @ cross)
        saturation = 1 + self.colour * rng.uniform(-0.7, 0.7)
        contrast = 1 + self.colour * rng.uniform(-0.4, 0.4)
        return (contrast * (saturation * np.eye(3) + (1 - saturation) * to_gray) @ rotation).astype(np.float32)
