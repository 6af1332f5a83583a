"""Scenes: small images of one to three objects, each a pure function of (seed, split, index).

*Single*: one object that fills 75-95% of the image. *Grid*: 2 x 2 cells with objects in some of them, each filling
75-95% of its cell, jittered, sometimes mirrored, on a white or pastel background.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .augment import Augmentation
from .concepts import Subject

IMAGE_SIZE = 96
"""Side of a scene in pixels."""

SPLITS = {"train": 0, "validation": 1, "test": 2}
"""Number of each split, part of the seed of its scenes."""

CELLS = ("top left", "top right", "bottom left", "bottom right")
"""Names of the cells of a grid, in reading order."""


@dataclass(frozen=True)
class SceneObject:
    """
    One object of a scene.

    Args:
        subject (`int`): Index of the subject; for concepts the index of the concept.
        cell (`int`, *optional*): Index into [`CELLS`]; `None` for the one object of a single.
        drawing (`int`): Index of the drawing among the subject's; `subject.vendors[drawing]` made it.
    """

    subject: int
    cell: int | None
    drawing: int


@dataclass(frozen=True)
class Layout:
    """
    What is where, and how one says it.

    Args:
        objects (`tuple[SceneObject, ...]`): The objects in reading order.
        caption (`str`): What there is, in one line.
    """

    objects: tuple[SceneObject, ...]
    caption: str

    @property
    def is_single(self) -> bool:
        """Whether it is one object that fills the image."""
        return self.objects[0].cell is None


@dataclass(frozen=True)
class Scene(Layout):
    """
    An image of the world and what is in it.

    Args:
        objects (`tuple[SceneObject, ...]`): The objects in reading order.
        caption (`str`): What the image shows, in one line.
        image (`Image.Image`): RGB, 96 x 96.
    """

    image: Image.Image


def describe(labels: Sequence[str], cells: Sequence[int | None]) -> str:
    """
    The caption of a scene.

    Args:
        labels (`Sequence[str]`): Names of one to four objects, in reading order.
        cells (`Sequence[int | None]`): Their cells.

    Returns:
        `str`: For instance `"horse"`, `"horse to the left of watermelon"`, `"horse above watermelon"`,
        `"horse and watermelon"` (diagonal) or `"horse, watermelon and key"`.
    """
    if len(labels) == 1:
        return labels[0]
    if len(labels) == 2 and cells[0] is not None and cells[1] is not None:
        (row, column), (other_row, other_column) = divmod(cells[0], 2), divmod(cells[1], 2)
        if row == other_row:
            return f"{labels[0]} to the left of {labels[1]}"
        if column == other_column:
            return f"{labels[0]} above {labels[1]}"
    return f"{', '.join(labels[:-1])} and {labels[-1]}"


@dataclass(frozen=True)
class World:
    """
    A map-style dataset of scenes: `world[i]` is the same [`Scene`] at every call and on every machine.

    Args:
        subjects (`Sequence[Subject]`): What can be in a scene.
        split (`str`): One of [`SPLITS`].
        length (`int`): Number of scenes.
        seed (`int`, *optional*, defaults to 0): Seed of the whole world.
        single_fraction (`tuple[float, float]`, *optional*, defaults to `(0.5, 0.5)`):
            Share of singles at the beginning and at the end of the dataset, linear in between.
        max_objects (`int`, *optional*, defaults to 3): Most objects in a grid, at most 4.
        pastel_fraction (`float`, *optional*, defaults to 0.5): Share of scenes on a pastel ground; the others are white.
        augmentation ([`Augmentation`], *optional*): Changes of the drawings; none by default.
        weights (`np.ndarray`, *optional*): Probability of each subject, `(len(subjects),)`; uniform by default.
    """

    subjects: Sequence[Subject]
    split: str
    length: int
    seed: int = 0
    single_fraction: tuple[float, float] = (0.5, 0.5)
    max_objects: int = 3
    pastel_fraction: float = 0.5
    augmentation: Augmentation | None = None
    weights: np.ndarray | None = None
    _cumulative: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}, but must be one of {list(SPLITS)}.")
        if not 1 <= self.max_objects <= len(CELLS):
            raise ValueError(f"max_objects is {self.max_objects}, but a grid has {len(CELLS)} cells: choose 1 to 4.")
        if len(self.subjects) < self.max_objects:
            raise ValueError(
                f"{self.max_objects} different objects an image need as many subjects; got {len(self.subjects)}."
            )
        weights = np.ones(len(self.subjects)) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        if weights.shape != (len(self.subjects),):
            raise ValueError(f"weights has shape {weights.shape}, expected ({len(self.subjects)},), one a subject.")
        object.__setattr__(self, "_cumulative", np.cumsum(weights / weights.sum()))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        """
        Scene `index`.

        Raises:
            IndexError: If the index is out of range.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of a world of {self.length}")
        rng = np.random.default_rng([self.seed, SPLITS[self.split], index])
        return self.draw(self.layout(index, rng), rng)

    def layout(self, index: int, rng: np.random.Generator) -> Layout:
        """
        What is in a scene and where, without drawing it.

        Args:
            index (`int`): Index of the scene; only the share of singles depends on it.
            rng (`np.random.Generator`): Source of randomness.
        """
        start, end = self.single_fraction
        if rng.random() < start + (end - start) * index / max(1, self.length - 1):
            cells: list[int | None] = [None]
        else:
            count = int(rng.integers(1, self.max_objects + 1))
            cells = sorted(rng.choice(len(CELLS), size=count, replace=False).tolist())
        return self.arrange(self._choose_subjects(len(cells), rng), cells, rng)

    def arrange(self, subjects: Sequence[int], cells: Sequence[int | None], rng: np.random.Generator) -> Layout:
        """
        A layout of given subjects, with a drawing chosen for each.

        Args:
            subjects (`Sequence[int]`): Index of each object's subject, in reading order.
            cells (`Sequence[int | None]`): Cell of each object.
            rng (`np.random.Generator`): Source of randomness.
        """
        objects = tuple(
            SceneObject(subject, cell, int(rng.integers(len(self.subjects[subject].drawings))))
            for subject, cell in zip(subjects, cells)
        )
        return Layout(objects, describe([self.subjects[subject].label for subject in subjects], cells))

    def draw(self, layout: Layout, rng: np.random.Generator) -> Scene:
        """
        Draw a layout; size, place, mirroring and background are random.

        Args:
            layout ([`Layout`]): What is where.
            rng (`np.random.Generator`): Source of randomness.
        """
        canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), self._background(rng))
        for item in layout.objects:
            icon = Image.fromarray(self.subjects[item.subject].drawings[item.drawing])
            self._place(canvas, icon, item.cell, rng)
        return Scene(layout.objects, layout.caption, canvas)

    def _place(self, canvas: Image.Image, icon: Image.Image, cell: int | None, rng: np.random.Generator) -> None:
        """Paste one icon into its cell (or the whole image) at a random size and offset."""
        if self.augmentation is not None:
            icon = self.augmentation(icon, rng)
        if rng.random() < 0.3:
            icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        space = IMAGE_SIZE if cell is None else IMAGE_SIZE // 2
        size = round(space * rng.uniform(0.75, 0.95))
        icon = icon.resize((size, size), Image.Resampling.BILINEAR)
        row, column = divmod(cell or 0, 2)
        left, top = rng.integers(0, space - size + 1, size=2).tolist()
        canvas.paste(icon, (column * space + left, row * space + top), icon)

    def _background(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """White, or a pastel colour."""
        if rng.random() >= self.pastel_fraction:
            return (255, 255, 255)
        red, green, blue = rng.integers(205, 256, size=3).tolist()
        return (red, green, blue)

    def _choose_subjects(self, count: int, rng: np.random.Generator) -> list[int]:
        """Different subjects, drawn by their weights."""
        chosen: list[int] = []
        while len(chosen) < count:
            subject = min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self.subjects) - 1)
            if subject not in chosen:
                chosen.append(subject)
        return chosen


def evaluation_images(world: World, count: int) -> list[Scene]:
    """
    Singles for measuring: each subject in turn, in layouts that depend on the world's seed and split alone.

    Args:
        world ([`World`]): Whose subjects, seed and split are used; its augmentation should be off.
        count (`int`): How many images; image `i` shows subject `i % len(world.subjects)`.

    Returns:
        `list[Scene]`: The scenes.
    """
    scenes = []
    for index in range(count):
        rng = np.random.default_rng([world.seed, SPLITS[world.split], 1_000_000 + index])
        scenes.append(world.draw(world.arrange([index % len(world.subjects)], [None], rng), rng))
    return scenes
