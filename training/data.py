"""What the stages read: captioned images (pretraining) and conversations about images (instruction tuning).

Both come either from the world of `libra-tiny` (`dataset: world`, drawn on the fly, the same at every run) or from a
folder of one's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset as TableDataset
from datasets import load_dataset
from torch.utils.data import Dataset

from .images import CaptionedFolder
from .world.augment import Augmentation
from .world.concepts import Concept, load_concepts, training_subjects
from .world.questions import scene_questions
from .world.scenes import Scene, World


@dataclass
class DataArguments:
    """
    Where samples come from.

    Args:
        dataset (`str`, *optional*, defaults to `"world"`):
            `"world"`, or a folder: of images with a `metadata.jsonl` for pretraining, a dataset with the columns
            `messages` and `images` (as `datasets.load_dataset` reads it) for instruction tuning.
        icons (`str`, *optional*): folder with iconify JSON files; by default they are installed with npm.
        train_samples (`int`, *optional*, defaults to 100000): scenes of the world in an epoch.
        eval_samples (`int`, *optional*, defaults to 500): scenes of the validation split.
        single_fraction (`list[float]`, *optional*, defaults to `[0.5, 0.5]`): share of scenes with one object, at the
            beginning and the end of an epoch.
        augmentation (`dict`, *optional*): settings of [`~training.world.augment.Augmentation`].

    Raises:
        ValueError: if there are to be no training samples.
    """

    dataset: str = field(default="world", metadata={"help": "'world', or a folder."})
    icons: str | None = field(default=None, metadata={"help": "Folder with iconify JSON files (default: npm)."})
    train_samples: int = field(default=100_000, metadata={"help": "Scenes of the world in an epoch."})
    eval_samples: int = field(default=500, metadata={"help": "Scenes of the validation split."})
    single_fraction: list[float] = field(
        default_factory=lambda: [0.5, 0.5], metadata={"help": "Share of singles at the beginning and the end."}
    )
    augmentation: dict = field(default_factory=dict, metadata={"help": "Settings of Augmentation."})

    def __post_init__(self):
        if self.train_samples < 1:
            raise ValueError(f"train_samples must be at least 1, found {self.train_samples}.")


class CaptionSamples(Dataset):
    """
    Captioned images as `{"image", "text"}`.

    Args:
        source ([`World`] or [`CaptionedFolder`]): the images.
    """

    def __init__(self, source: World | CaptionedFolder) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`."""
        sample = self.source[index]
        if isinstance(sample, Scene):
            return {"image": sample.image, "text": sample.caption}
        image, text = sample
        return {"image": image, "text": text}


def load_worlds(data: DataArguments) -> tuple[World, World]:
    """
    The training and the validation split of the world, both of the training vendors.

    Args:
        data ([`DataArguments`]): sizes and augmentation; the latter is for the training split only.

    Returns:
        `tuple` of two [`World`].
    """
    subjects = training_subjects(data.icons)
    start, end = data.single_fraction
    train = World(
        subjects,
        split="train",
        length=data.train_samples,
        single_fraction=(start, end),
        augmentation=Augmentation(**data.augmentation) if data.augmentation else None,
    )
    return train, World(subjects, split="validation", length=data.eval_samples)


def load_caption_data(data: DataArguments) -> tuple[Dataset, Dataset | None]:
    """
    Captioned images for pretraining.

    Args:
        data ([`DataArguments`]): where from.

    Returns:
        `tuple`: training and evaluation dataset of `{"image", "text"}`; a folder has no evaluation part.
    """
    if data.dataset == "world":
        train, validation = load_worlds(data)
        return CaptionSamples(train), CaptionSamples(validation)
    return CaptionSamples(CaptionedFolder(data.dataset)), None


def to_conversation(
    scene: Scene, rng: np.random.Generator, concepts: Sequence[Concept], max_turns: int = 2
) -> dict[str, Any]:
    """
    A scene with some of its questions, as TRL reads conversations. The first question asks what is there: naming is
    what all other answers build on, and the slowest to learn.

    Args:
        scene ([`Scene`]): the scene.
        rng (`np.random.Generator`): chooses the questions.
        concepts (`Sequence[Concept]`): the concepts there are; questions name absent ones too.
        max_turns (`int`, *optional*, defaults to 2): most questions.

    Returns:
        `dict`: `messages`, alternating user and assistant, and `images`, the one image.
    """
    questions = scene_questions(scene, rng, concepts)
    naming = [question for question in questions if question.kind in ("caption", "label")]
    first = naming[rng.integers(len(naming))]
    others = [question for question in questions if question is not first]
    rest = rng.permutation(len(others))[: rng.integers(max_turns)]
    messages = []
    for question in [first, *(others[i] for i in rest)]:
        messages.append({"role": "user", "content": question.question})
        messages.append({"role": "assistant", "content": question.answer})
    return {"messages": messages, "images": [scene.image]}


def world_conversations(world: World) -> TableDataset:
    """
    The scenes of a world as a dataset of conversations, drawn when they are read.

    Args:
        world ([`World`]): the scenes.

    Returns:
        `datasets.Dataset` whose samples have `messages` and `images`.
    """

    concepts = load_concepts(len(world.subjects))

    def draw(rows: dict[str, list[int]]) -> dict[str, list]:
        samples = [to_conversation(world[i], np.random.default_rng([world.seed, i]), concepts) for i in rows["scene"]]
        return {key: [sample[key] for sample in samples] for key in samples[0]}

    return TableDataset.from_dict({"scene": list(range(len(world)))}).with_transform(draw)


def load_conversations(data: DataArguments) -> tuple[TableDataset, TableDataset | None]:
    """
    Conversations for instruction tuning.

    Args:
        data ([`DataArguments`]): where from.

    Returns:
        `tuple`: training and evaluation dataset; a dataset of one's own is used for training only.

    Raises:
        ValueError: if a dataset lacks the columns `messages` and `images`.
    """
    if data.dataset == "world":
        train, validation = load_worlds(data)
        return world_conversations(train), world_conversations(validation)
    dataset = load_dataset(data.dataset, split="train")
    missing = {"messages", "images"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"The dataset {data.dataset} lacks the columns {sorted(missing)}; it has {dataset.column_names}. Expected: "
            "`messages` (a conversation) and `images` (a list of images)."
        )
    return dataset, None
