"""What the stages read: captioned images (pretraining) and conversations about images (instruction tuning).

Both come either from the world of `libra-tiny` (`dataset: world`, drawn on the fly, the same at every run) or from data
of one's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset as TableDataset
from torch.utils.data import Dataset

from .world.augment import Augmentation
from .world.concepts import Concept, load_concepts, training_subjects
from .world.corpus import describe_places
from .world.options import ask_for_letters
from .world.questions import (
    GRID_KINDS,
    NUM_OPTIONS,
    SINGLE_KINDS,
    Question,
    scene_questions,
    without_prompt,
    wrong_answer,
)
from .world.scenes import Layout, Scene, World

NO = ("no", "没有")
"""Answers to yes/no questions about what is not there."""


@dataclass
class DataArguments:
    """
    Where samples come from.

    Args:
        dataset (`str`, *optional*, defaults to `"world"`):
            `"world"`, or where the data are: captioned images for pretraining (see
            [`~training.captions.load_captions`]), conversations for instruction tuning (see [`~training.conversations`]).
        icons (`str`, *optional*): folder with iconify JSON files; by default they are installed with npm.
        num_concepts (`int`, *optional*, defaults to 100): things that scenes of the world show, the first of its list.
        train_samples (`int`, *optional*, defaults to 100000): scenes of the world in an epoch. With `max_steps` that see
            them several times it is row (c) of the paper's Table 3, data size.
        eval_samples (`int`, *optional*, defaults to 500): samples of the validation split, at most.
        single_fraction (`list[float]`, *optional*, defaults to `[0.5, 0.5]`): share of scenes with one object, at the
            beginning and the end of an epoch.
        augmentation (`dict`, *optional*): settings of [`~training.world.augment.Augmentation`].
        max_turns (`int`, *optional*, defaults to 2): most questions about a scene in a conversation.
        naming_first (`bool`, *optional*, defaults to `True`): whether its first question asks what is there. A model that
            cannot name yet learns nothing from the others; one that can should be asked them first as well, or it reads
            their answers off the name before.
        named_once (`bool`, *optional*, defaults to `False`): whether the questions of a conversation name each thing at most
            once, or all name none. Else many can be answered from the text before them, and few are left that teach to
            look for what they name.
        kinds (`list[str]`, *optional*): of the questions that those of a conversation are chosen from, of
            [`~training.world.questions.SINGLE_KINDS`] and [`~training.world.questions.GRID_KINDS`], as often as they are
            named; by default each kind that fits the scene once.
        similar (`float`, *optional*, defaults to 1.0): share of the absent things in yes/no questions that are chosen from
            the group of a present one, which are hard to tell from it; the others are any.
        bare_share (`float`, *optional*, defaults to 0.0): share of the questions that are asked without the prompt of their
            kind, as users ask them.
        text_share (`float`, *optional*, defaults to 0.0): share of the conversations about a line of text that says what
            is where, without an image. The language model learns from them to look up what it is asked, and images only
            have to become as readable to it as the line is.
        letters_share (`float`, *optional*, defaults to 0.0): share of the conversations about the letters of a list of
            options, without an image either, see [`~training.world.options.ask_for_letters`].

    Raises:
        ValueError: if there are to be no training samples, no concepts or no questions (about some scenes).
    """

    dataset: str = field(default="world", metadata={"help": "'world', or where the data are."})
    icons: str | None = field(default=None, metadata={"help": "Folder with iconify JSON files (default: npm)."})
    num_concepts: int = field(default=100, metadata={"help": "Things that scenes of the world show."})
    train_samples: int = field(default=100_000, metadata={"help": "Scenes of the world in an epoch."})
    eval_samples: int = field(default=500, metadata={"help": "Samples of the validation split."})
    single_fraction: list[float] = field(
        default_factory=lambda: [0.5, 0.5], metadata={"help": "Share of singles at the beginning and the end."}
    )
    augmentation: dict = field(default_factory=dict, metadata={"help": "Settings of Augmentation."})
    max_turns: int = field(default=2, metadata={"help": "Most questions about a scene of the world."})
    naming_first: bool = field(default=True, metadata={"help": "Whether the first one asks what is there."})
    named_once: bool = field(default=False, metadata={"help": "Whether questions name a thing once at most."})
    kinds: list[str] | None = field(default=None, metadata={"help": "Kinds of questions, as often as named (all)."})
    similar: float = field(default=1.0, metadata={"help": "Share of absent things that are like a present one."})
    bare_share: float = field(default=0.0, metadata={"help": "Share of the questions without their prompt."})
    text_share: float = field(default=0.0, metadata={"help": "Share of the conversations about a line of text."})
    letters_share: float = field(default=0.0, metadata={"help": "Share of the conversations about lists of options."})

    def __post_init__(self):
        for name in ("train_samples", "num_concepts", "max_turns"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, found {vars(self)[name]}.")
        for name in ("similar", "bare_share", "text_share", "letters_share"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, found {vars(self)[name]}.")
        if self.named_once and self.naming_first:
            raise ValueError("naming_first and named_once are opposites: set one of them to false.")
        if self.kinds is not None:
            self._check_kinds(set(self.kinds))

    def _check_kinds(self, kinds: set[str]) -> None:
        """Refuses kinds of questions that there are not, or with which nothing could be asked about some scenes."""
        if unknown := sorted(kinds - {*SINGLE_KINDS, *GRID_KINDS}):
            raise ValueError(f"kinds are of {sorted({*SINGLE_KINDS, *GRID_KINDS})}, found {unknown}.")
        for scenes, fitting in {"singles": SINGLE_KINDS, "grids": GRID_KINDS}.items():
            if kinds.isdisjoint(fitting):
                raise ValueError(
                    f"kinds must have one of {list(fitting)} to ask about {scenes}, found {sorted(kinds)}."
                )
        if self.naming_first and "caption" not in kinds:
            raise ValueError("With naming_first kinds must have 'caption'; add it, or set naming_first to false.")


class CaptionSamples(Dataset):
    """
    Captioned images as `{"image", "text", "place"}`; `place` is the index, as a tuple.

    Args:
        source ([`World`]): the images.
    """

    def __init__(self, source: World) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`."""
        scene = self.source[index]
        return {"image": scene.image, "text": scene.caption, "place": (index,)}


def load_worlds(data: DataArguments) -> tuple[World, World]:
    """
    The training and the validation split of the world, both of the training vendors.

    Args:
        data ([`DataArguments`]): sizes and augmentation; the latter is for the training split only.

    Returns:
        `tuple` of two [`World`].
    """
    subjects = training_subjects(data.icons)[: data.num_concepts]
    start, end = data.single_fraction
    train = World(
        subjects,
        split="train",
        length=data.train_samples,
        single_fraction=(start, end),
        augmentation=Augmentation(**data.augmentation) if data.augmentation else None,
    )
    return train, World(subjects, split="validation", length=data.eval_samples)


def load_caption_data(data: DataArguments) -> tuple[Dataset, Dataset]:
    """
    Captioned scenes of the world for pretraining.

    Args:
        data ([`DataArguments`]): sizes and augmentation.

    Returns:
        `tuple`: training and evaluation dataset of `{"image", "text", "place"}`.
    """
    train, validation = load_worlds(data)
    return CaptionSamples(train), CaptionSamples(validation)


def to_conversation(
    scene: Layout, rng: np.random.Generator, concepts: Sequence[Concept], data: DataArguments
) -> dict[str, Any]:
    """
    A scene with some of its questions, as TRL reads conversations. No question comes twice.

    Args:
        scene ([`Scene`] or [`Layout`]): the scene; what is where in a layout, which has no image, a line before the first
            question says.
        rng (`np.random.Generator`): chooses the questions.
        concepts (`Sequence[Concept]`): the concepts there are; questions name absent ones too.
        data ([`DataArguments`]): how many questions, and which.

    Returns:
        `dict`: `messages`, alternating user and assistant, and `images`, the one image or none.
    """
    questions = _questions_of_kinds(scene, rng, concepts, data)
    order = [questions[i] for i in rng.permutation(len(questions))]
    if data.naming_first:
        first = next(question for question in order if question.kind in ("caption", "label"))
        order = [first, *(question for question in order if question is not first)]
    if data.named_once:
        order = _name_once(order, rng)
    # Repeated ones go only now that all are in order: what is there is asked for again and again, so is as often the first.
    order = list({question.question: question for question in order}.values())
    order = _balance(order, frozenset(item.subject for item in scene.objects), data.named_once, rng)
    chosen = [
        replace(question, question=without_prompt(question.question)) if rng.random() < data.bare_share else question
        for question in order[: rng.integers(data.max_turns) + 1]
    ]
    messages = as_messages(chosen)
    if isinstance(scene, Scene):
        return {"messages": messages, "images": [scene.image]}
    messages[0]["content"] = f"{describe_places(scene, rng, concepts)}\n{messages[0]['content']}"
    return {"messages": messages, "images": []}


def as_messages(questions: Sequence[Question]) -> list[dict[str, str]]:
    """
    Args:
        questions (`Sequence[Question]`): of one conversation, in order.

    Returns:
        `list` of `dict`: messages of user and assistant, alternating.
    """
    return [
        {"role": role, "content": content}
        for question in questions
        for role, content in (("user", question.question), ("assistant", question.answer))
    ]


def _questions_of_kinds(scene, rng, concepts, data):
    """What there is to choose from: every kind once, or the wanted ones, as often as they are named; some may be the same."""
    if data.kinds is None:
        return scene_questions(scene, rng, concepts, data.similar)
    rounds = ((kind, scene_questions(scene, rng, concepts, data.similar)) for kind in data.kinds)
    return [question for kind, questions in rounds for question in questions if question.kind == kind]


def _name_once(questions: Sequence[Question], rng: np.random.Generator) -> list[Question]:
    """Either those that name things no other has named, or those that name none: in proportion to how many there are."""
    naming: list[Question] = []
    named: set[int] = set()
    for question in questions:
        if question.names and named.isdisjoint(question.names):
            naming.append(question)
            named |= question.names
    others = [question for question in questions if not question.names]
    return naming if rng.random() < 1 - len(others) / len(questions) else others


def _balance(
    questions: Sequence[Question], present: frozenset[int], named_once: bool, rng: np.random.Generator
) -> list[Question]:
    """
    Leaves out questions for what is not there as those that can still be asked for what is become fewer, so that half of
    the yes/no questions have no wherever in the conversation they stand. They are drawn half and half, but few things are
    there, and no question comes twice.
    """
    kept: list[Question] = []
    for question in questions:
        rivals = (other for other in kept if named_once or other.kind == question.kind)
        left = present.difference(*(other.names for other in rivals))
        if question.answer not in NO or rng.random() < len(left) / len(present):
            kept.append(question)
    return kept


def world_conversations(world: World, data: DataArguments) -> TableDataset:
    """
    The scenes of a world as a dataset of conversations, drawn when they are read.

    Args:
        world ([`World`]): the scenes.
        data ([`DataArguments`]): how many questions, and which.

    Returns:
        `datasets.Dataset` whose samples have `messages` and `images`.
    """

    concepts = load_concepts(len(world.subjects))

    def draw_one(index: int) -> dict[str, Any]:
        rng = np.random.default_rng([world.seed, index])
        if data.letters_share > 0 and rng.random() < data.letters_share:
            return {"messages": as_messages([ask_for_letters(rng, concepts)]), "images": []}
        is_text = data.text_share > 0 and rng.random() < data.text_share
        scene = world.layout(index, rng) if is_text else world[index]
        return to_conversation(scene, rng, concepts, data)

    def draw(rows: dict[str, list[int]]) -> dict[str, list]:
        samples = [draw_one(i) for i in rows["scene"]]
        return {key: [sample[key] for sample in samples] for key in samples[0]}

    return TableDataset.from_dict({"scene": list(range(len(world)))}).with_transform(draw)


def _worlds_to_ask_about(data: DataArguments) -> tuple[World, World]:
    least = World.max_objects + NUM_OPTIONS - 1
    if data.num_concepts < least:
        raise ValueError(
            f"num_concepts is {data.num_concepts}, expected at least {least}: an image has up to {World.max_objects} "
            f"things, and a question with options names {NUM_OPTIONS - 1} others."
        )
    return load_worlds(data)


def load_world_conversations(data: DataArguments) -> tuple[TableDataset, TableDataset]:
    """
    Conversations about scenes of the world for instruction tuning.

    Args:
        data ([`DataArguments`]): sizes, augmentation and questions.

    Returns:
        `tuple`: training and evaluation dataset.

    Raises:
        ValueError: for fewer concepts than questions with options need.
    """
    train, validation = _worlds_to_ask_about(data)
    return world_conversations(train, data), world_conversations(validation, data)


def to_preference(scene: Scene, rng: np.random.Generator, concepts: Sequence[Concept]) -> dict[str, Any]:
    """
    A question about a scene with the right answer and a wrong one: what is there, or, if there is more than one thing,
    where something is.

    Args:
        scene ([`Scene`]): the scene.
        rng (`np.random.Generator`): chooses question and wrong answer.
        concepts (`Sequence[Concept]`): the concepts there are.

    Returns:
        `dict`: as [`~training.preferences.PreferenceCollator`] takes it.
    """
    question = next(q for q in scene_questions(scene, rng, concepts) if q.kind in ("label", "place"))
    parts = [{"type": "image", "text": None}, {"type": "text", "text": question.question}]
    sample: dict[str, Any] = {"prompt": [{"role": "user", "content": parts}], "images": [scene.image]}
    for name, answer in (("chosen", question.answer), ("rejected", wrong_answer(scene, question, rng, concepts))):
        sample[name] = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return sample


def load_world_preferences(data: DataArguments) -> tuple[TableDataset, TableDataset]:
    """
    Preferences about scenes of the world, see [`to_preference`].

    Args:
        data ([`DataArguments`]): sizes and augmentation.

    Returns:
        `tuple`: training and evaluation dataset.

    Raises:
        ValueError: for fewer concepts than questions with options need.
    """

    def preferences(world: World) -> TableDataset:
        concepts = load_concepts(len(world.subjects))

        def draw(rows: dict[str, list[int]]) -> dict[str, list]:
            samples = [to_preference(world[i], np.random.default_rng([world.seed, i]), concepts) for i in rows["scene"]]
            return {key: [sample[key] for sample in samples] for key in samples[0]}

        return TableDataset.from_dict({"scene": list(range(len(world)))}).with_transform(draw)

    train, validation = _worlds_to_ask_about(data)
    return preferences(train), preferences(validation)
