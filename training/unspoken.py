"""Names that a model has in mind instead of writing them.

A choice may be answered with its letter alone (Table 6), or with the name first: "horse: B". A model of few layers learns
the second only. It looks up the letter of a name that is written, while of what it sees it is not known before the last
layer which option fits, and no layer is left to fetch the letter (training/LOG.md). So every step also has a few questions
in both forms, and where the letter is about to be written the hidden states of the short one are drawn to those of the long
one, in the layers that look it up: an implicit chain of thought, distilled from the written one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch

from processing.processing_libra import NO_LENGTH_LIMIT, LibraProcessor

from .answers import AnswerCollator, row_length
from .data import DataArguments, as_messages, load_worlds
from .world.concepts import Concept, load_concepts
from .world.questions import NUM_OPTIONS, choice_questions, choices_of
from .world.scenes import World

MAX_QUESTIONS = 4
"""About each scene, if they fit the context: its image is the larger part of the cost."""
SINGLES_SHARE = 0.2
"""Of the scenes. Grids take longer to learn: which option is there has to be known of up to three things."""


@dataclass
class UnspokenArguments:
    """
    How choices are learned without writing names. Only the world has both forms of them.

    Args:
        unspoken_weight (`float`, *optional*, defaults to 0.0): of the distance of hidden states, beside the loss of these
            questions' answers, which counts like that of the others; at 0 there are none.
        unspoken_batch_size (`int`, *optional*, defaults to 4): scenes of each device in a step, each in both forms.
        unspoken_layers (`list[int]`, *optional*, defaults to `[3, 4]`):
            After which layers hidden states are compared, counted from 1. The first should be one after which a written
            name has been read and its letter not been looked up.

    Raises:
        ValueError: for a negative weight, no scene or no layer.
    """

    unspoken_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance of hidden states without and with the name; 0: none."}
    )
    unspoken_batch_size: int = field(default=4, metadata={"help": "Scenes of each device in a step, in both forms."})
    unspoken_layers: list[int] = field(
        default_factory=lambda: [3, 4], metadata={"help": "Layers after which hidden states are compared, from 1."}
    )

    def __post_init__(self):
        if self.unspoken_weight < 0:
            raise ValueError(f"unspoken_weight must not be negative, found {self.unspoken_weight}.")
        if self.unspoken_batch_size < 1:
            raise ValueError(f"unspoken_batch_size must be at least 1, found {self.unspoken_batch_size}.")
        if not self.unspoken_layers or min(self.unspoken_layers) < 1:
            raise ValueError(f"unspoken_layers are counted from 1, one at least, found {self.unspoken_layers}.")

    def open(self, data: DataArguments, processor: LibraProcessor, seed: int) -> "UnspokenNames | None":
        """
        Args:
            data ([`DataArguments`]): of the conversations.
            processor ([`LibraProcessor`]): makes ids.
            seed (`int`): of all choices.

        Returns:
            [`UnspokenNames`]: or None if there are to be none.

        Raises:
            ValueError: for conversations of one's own, or if the context of the model is too short for a question.
        """
        if self.unspoken_weight == 0:
            return None
        if data.dataset != "world":
            raise ValueError(
                f"unspoken_weight is set, but dataset is {data.dataset!r}: only 'world' has questions in both forms."
            )
        concepts = load_concepts(data.num_concepts)
        questions = questions_that_fit(processor, [concept.label for concept in concepts])
        if questions == 0:
            raise ValueError(
                "unspoken_weight is set, but the context of the model is too short for an image and a question."
            )
        scenes = load_worlds(replace(data, single_fraction=[SINGLES_SHARE, SINGLES_SHARE]))[0]
        return UnspokenNames(
            scenes=scenes,
            concepts=concepts,
            collator=AnswerCollator(processor),
            batch_size=self.unspoken_batch_size,
            questions=questions,
            weight=self.unspoken_weight,
            layers=tuple(self.unspoken_layers),
            seed=seed,
        )


@dataclass(frozen=True)
class UnspokenNames:
    """
    The questions of every step in both forms: a function of the step, as [`~training.rehearsal.Rehearsal`].

    Args:
        scenes ([`World`]): of the training split, singles and grids.
        concepts (`Sequence[Concept]`): what can be an option.
        collator ([`AnswerCollator`]): makes batches; it cuts nothing off.
        batch_size (`int`): scenes a process.
        questions (`int`): about each of them.
        weight (`float`): of the distance.
        layers (`tuple[int, ...]`): after which hidden states are compared, counted from 1.
        seed (`int`): of all choices.
    """

    scenes: World
    concepts: Sequence[Concept]
    collator: AnswerCollator
    batch_size: int
    questions: int
    weight: float
    layers: tuple[int, ...]
    seed: int

    def check_layers(self, num_layers: int) -> None:
        """
        Args:
            num_layers (`int`): of the model that is tuned.

        Raises:
            ValueError: if it has not all of `layers`.
        """
        if max(self.layers) > num_layers:
            raise ValueError(f"unspoken_layers are {list(self.layers)}, but the model has only {num_layers} layers.")

    def of_step(self, step: int, process: int, num_processes: int) -> dict[str, torch.Tensor]:
        """
        Args:
            step (`int`): of the run.
            process (`int`): of those that share the step's scenes, in `[0, num_processes)`.
            num_processes (`int`): how many there are.

        Returns:
            `dict`: as of [`AnswerCollator`], of `2 * batch_size` rows: first all with letters alone, then the same
            scenes and options in the same order with names and letters.
        """
        conversations: list[list] = [[], []]  # of the short and of the long form
        for row in range(process, self.batch_size * num_processes, num_processes):
            rng = np.random.default_rng([self.seed, step, row])
            scene = self.scenes[int(rng.integers(len(self.scenes)))]
            asked = [choice_questions(scene, rng, self.concepts) for _ in range(self.questions)]
            for found, questions in zip(conversations, zip(*asked)):
                found.append({"messages": as_messages(questions), "images": [scene.image]})
        return self.collator(conversations[0] + conversations[1])


def states_apart(hidden_states: Sequence[torch.Tensor], labels: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """
    How far what is had in mind is from what was written: the mean over letters and `layers` of `|h - h'|^2 / |h'|^2`, with
    h where a letter alone is about to be written and h' where it is after its name. h' has no gradient.

    Args:
        hidden_states (`Sequence[torch.Tensor]`): of embeddings and each layer, `(rows, length, hidden)`.
        labels (`torch.LongTensor` of shape `(rows, length)`): of [`UnspokenNames.of_step`].
        layers (`Sequence[int]`): after which hidden states are compared, counted from 1.

    Returns:
        `torch.Tensor` of shape `()`, in float32.
    """
    short, long = places_of_letters(labels)
    distances = []
    for layer in layers:
        states = hidden_states[layer].float()
        thought, written = states[short[0], short[1]], states[long[0], long[1]].detach()  # (letters, hidden)
        distances.append(((thought - written).square().sum(-1) / written.square().sum(-1)).mean())
    return torch.stack(distances).mean()


def questions_that_fit(processor: LibraProcessor, labels: Sequence[str]) -> int:
    """
    Args:
        processor ([`LibraProcessor`]): its tokenizer knows the context of the model.
        labels (`Sequence[str]`): names that options may have, as many as a question has at least.

    Returns:
        `int`: how many choices about one image fit whatever their options are, at most [`MAX_QUESTIONS`].
    """
    longest = sorted(labels, key=lambda label: len(processor.tokenizer(label)["input_ids"]))[-NUM_OPTIONS:]
    named = choices_of(longest, len(longest) - 1)[1:]
    text = processor.apply_chat_template(as_messages(named), tokenize=False)
    room = (row_length(processor, None) or NO_LENGTH_LIMIT) - processor.num_image_tokens
    return min(MAX_QUESTIONS, room // len(processor.tokenizer(text)["input_ids"]))


def places_of_letters(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Where the short answers begin, and where the long ones go on as they do: one token before, which predicts the next.

    Args:
        labels (`torch.LongTensor` of shape `(2 * conversations, length)`): short answers in the first half of the rows,
            in the other half answers to the same questions that end as they do; -100 where nothing is supervised.

    Returns:
        `tuple` of two `torch.LongTensor` of shape `(2, answers)`: rows and columns, of the short answers and, in the same
        order, of the long ones.

    Raises:
        ValueError: if an answer of the second half does not end in that of the first.
    """
    answers = [_answers_of(row) for row in labels.tolist()]
    half = len(answers) // 2
    short, long = [], []
    for row in range(half):
        pairs = list(zip(answers[row], answers[half + row]))
        if not len(pairs) == len(answers[row]) == len(answers[half + row]) or any(
            whole[-len(end) :] != end for (_, end), (_, whole) in pairs
        ):
            raise ValueError(f"The answers in row {half + row} must end in those of row {row}, turn by turn.")
        short += [(row, first - 1) for (first, _), _ in pairs]
        long += [(half + row, first + len(whole) - len(end) - 1) for (_, end), (first, whole) in pairs]
    return torch.tensor(short, device=labels.device).T, torch.tensor(long, device=labels.device).T


def _answers_of(labels: list[int]) -> list[tuple[int, list[int]]]:
    """The supervised runs of a row: where each begins, and its tokens."""
    runs = (list(run) for is_answer, run in groupby(enumerate(labels), lambda item: item[1] != -100) if is_answer)
    return [(run[0][0], [token for _, token in run]) for run in runs]
