"""Images that libra-tiny writes: reconstructions and drawings of captions, and the teacher that recognises them.

The teacher is EfficientNet-Lite0 with its ImageNet weights, unchanged. A picture is recognised when, of the mean features
of all concepts as the training vendors draw them, those of the right concept are the nearest. It has seen nothing that
the model wrote; but the CLIP of libra-tiny was trained to imitate features of the same network, so it is independent of
the writing, not of the reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .analysis.reconstructing import reconstruct_images
from .analysis.writing import draw_images
from .teacher import compute_features, load_features
from .world.concepts import Subject
from .world.scenes import Layout, SceneObject, World

TEACHER_SIZE = 128
"""Side at which the teacher looks at pictures."""


def draw_captions(model: Any, processor: Any, captions: Sequence[str], temperature: float, seed: int = 0) -> list:
    """
    Text to image: one sample a caption, see [`~analysis.writing.draw_images`].

    Args:
        model ([`LibraForCausalLM`]): writes.
        processor ([`LibraProcessor`]): of the same repository.
        captions (`Sequence` of `str`): what to draw.
        temperature (`float`): divides the logits of the heads; above 0.
        seed (`int`, *optional*, defaults to 0): of the samples.

    Returns:
        `list` of `PIL.Image.Image`: an image a caption.
    """
    return [image for (image,) in draw_images(model, processor, captions, seed=seed, temperature=temperature)]


def reconstruct(processor: Any, images: Sequence[Image.Image]) -> tuple[list[Image.Image], np.ndarray, np.ndarray]:
    """
    Images through the image tokenizer: codes and back.

    Args:
        processor ([`LibraProcessor`]): whose image tokenizer is used.
        images (`Sequence` of `PIL.Image.Image`): the images, with their grounds.

    Returns:
        `tuple`: the reconstructions (`list` of `PIL.Image.Image`); the PSNR of each in decibels, of all pixels in [-1, 1]
        at the tokenizer's resolution, `(n,)`; and that of a plain image of the image's mean colour, `(n,)`.
    """
    found = reconstruct_images(processor, images)
    decibels = np.array([(one.psnr, one.plain_psnr) for one in found], dtype=np.float32)  # (n, 2)
    return [one.reconstruction for one in found], decibels[:, 0], decibels[:, 1]


@dataclass(frozen=True)
class Recogniser:
    """
    Names pictures by the nearest of some classes' mean features of the teacher, by cosine.

    Args:
        means (`np.ndarray`): `(classes, 1280)`, each of length 1.
    """

    means: np.ndarray

    @classmethod
    def of(cls, subjects: Sequence[Subject]) -> "Recogniser":
        """
        Learns how subjects look: every drawing of each as a single on white, without changes.

        Args:
            subjects (`Sequence` of [`Subject`]): the classes; at least as many as objects fit into a scene.
        """
        world = World(subjects, "train", length=len(subjects), pastel_fraction=0.0)
        images, classes = [], []
        for index, subject in enumerate(subjects):
            for drawing in range(len(subject.drawings)):
                layout = Layout((SceneObject(index, None, drawing),), subject.label)
                images.append(world.draw(layout, np.random.default_rng([index, drawing])).image)
                classes.append(index)
        features = _unit(load_features(_rgba(images), TEACHER_SIZE))
        rows = [features[np.equal(classes, index)].mean(axis=0) for index in range(len(subjects))]
        return cls(_unit(np.stack(rows)))

    def __call__(self, images: Sequence[Image.Image]) -> list[int]:
        """
        Args:
            images (`Sequence` of `PIL.Image.Image`): pictures of one size.

        Returns:
            `list` of `int`: the class of each.
        """
        features = _unit(compute_features(_rgba(images), TEACHER_SIZE))  # (n, 1280)
        return (features @ self.means.T).argmax(axis=1).tolist()


def _rgba(images: Sequence[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(image.convert("RGBA")) for image in images]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
