"""The text the world's language model is pretrained on: it knows the words and the formats, but no pictures.

A document is one of: a caption, as it follows an image; a fact ("a horse is an animal."); names said twice in the same
order; notes, a line of text that says what is where, with short questions and answers about it; a chat in the template
of the release, in which such a line stands where an image would; a chat without anything to look at. Most answers can be
read off the line, so the model learns what the questions mean. Notes are the same without the template: in chats, too
few tokens depend on what was said before for a small model to learn to look there. Repeated names teach to copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .concepts import Concept, Subject, load_concepts
from .questions import Question, scene_questions, with_article
from .scenes import CELLS, SPLITS, Layout, World

SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The system message of the release's chat template."""

END = "</s>"
"""Ends a document and an answer."""

KINDS_OF_THINGS = {
    "animal-mammal": "animal",
    "animal-bug": "animal",
    "plant-flower": "plant",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-prepared": "food",
    "food-asian": "food",
    "food-sweet": "sweet food",
    "drink": "drink",
    "place-geographic": "place",
    "place-building": "building",
    "place-religious": "building",
    "place-other": "place",
    "transport-ground": "thing on the road",
    "transport-water": "thing at sea",
    "transport-air": "thing that flies",
    "sky-weather": "thing in the sky",
    "event": "thing for a feast",
    "award-medal": "prize",
    "sport": "thing for sports",
    "game": "game",
    "arts-crafts": "thing of the arts",
    "clothing": "thing to wear",
    "sound": "thing that sounds",
    "musical-instrument": "musical instrument",
    "phone": "machine",
    "light-video": "device",
    "book-paper": "thing of paper",
    "mail": "letter",
    "writing": "thing to write with",
    "office": "thing in an office",
    "lock": "thing for a lock",
    "tool": "tool",
    "medical": "thing at a doctor's",
    "household": "thing at home",
}
"""What one calls the members of each of emojibase's subgroups."""


@dataclass(frozen=True)
class TextWorld:
    """
    A map-style dataset of documents: `corpus[i]` is the same text at every call.

    Args:
        split (`str`): `"train"` or `"validation"`.
        length (`int`): Number of documents.
        seed (`int`, *optional*, defaults to 0): Seed of the corpus.
    """

    split: str
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}, but must be one of {list(SPLITS)}.")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:
        """
        Document `index`.

        Raises:
            IndexError: If the index is out of range.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"document {index} of a corpus of {self.length}")
        rng = np.random.default_rng([self.seed, 100 + SPLITS[self.split], index])
        concepts = load_concepts()
        kind = rng.random()
        if kind < 0.05:
            return f"{_fact(rng, concepts)}{END}"
        layout = _layout(rng, concepts)
        if kind < 0.12:
            return f"\n{layout.caption}{END}"
        if kind < 0.2:
            return f"{_repetition(rng, concepts)}{END}"
        shown = describe_places(layout, rng, concepts)
        # Of each kind twice: what is asked is drawn anew. The same question is not asked again.
        questions = {turn.question: turn for _ in range(2) for turn in scene_questions(layout, rng, concepts)}
        turns = [list(questions.values())[i] for i in rng.permutation(len(questions))[: rng.integers(1, 9)]]
        if kind < 0.75:
            return notes(turns, shown)
        return chat(turns, shown if kind < 0.97 else None)


def chat(turns: Sequence[Question], shown: str | None = None) -> str:
    """
    A conversation in the release's chat template.

    Args:
        turns (`Sequence[Question]`): Questions with their answers, at least one.
        shown (`str`, *optional*): A line that stands before the first question, where an image would.
    """
    text = SYSTEM_MESSAGE
    for position, turn in enumerate(turns):
        context = f"{shown}\n" if shown and position == 0 else ""
        text += f"{' ' if position == 0 else ''}USER: {context}{turn.question} ASSISTANT: {turn.answer} {END}"
    return text


def notes(turns: Sequence[Question], shown: str) -> str:
    """
    A line that says what is where, its caption, and questions about it without their prompts.

    Args:
        turns (`Sequence[Question]`): Questions with their answers.
        shown (`str`): What is where.
    """
    lines = [shown]
    for turn in turns:
        *asked, _prompt = turn.question.split("\n")
        lines.append("\n".join([*asked, turn.answer]))
    return "\n".join(lines) + END


def prompts_with_answers(split: str, count: int, seed: int = 0) -> list[tuple[str, Question]]:
    """
    Questions about a line of text, to measure a language model with.

    Args:
        split (`str`): One of the splits; those of `"validation"` are not in the training documents but by chance.
        count (`int`): How many.
        seed (`int`, *optional*, defaults to 0): Seed of the questions.

    Returns:
        `list[tuple[str, Question]]`: The prompt up to `ASSISTANT:`, and the question with its answer.
    """
    concepts = load_concepts()
    cases = []
    for index in range(count):
        rng = np.random.default_rng([seed, 200 + SPLITS[split], index])
        layout = _layout(rng, concepts)
        questions = scene_questions(layout, rng, concepts)
        question = questions[int(rng.integers(len(questions)))]
        text = chat([question], describe_places(layout, rng, concepts))
        cases.append((text[: -len(f" {question.answer} {END}")], question))
    return cases


def _layout(rng: np.random.Generator, concepts: Sequence[Concept]) -> Layout:
    """A layout as in the world, with nothing drawn."""
    blank = np.zeros((1, 1, 4), dtype=np.uint8)
    subjects = [Subject(concept.label, (blank,), ("",)) for concept in concepts]
    return World(subjects, "train", length=1).layout(0, rng)


def describe_places(layout: Layout, rng: np.random.Generator, concepts: Sequence[Concept]) -> str:
    """
    A line of text that says what an image shows.

    Args:
        layout ([`Layout`]): What is where.
        rng (`np.random.Generator`): Chooses the language.
        concepts (`Sequence[Concept]`): The concepts.

    Returns:
        `str`: Every object with its place, so that all questions can be answered; in Chinese a tenth of the time.
    """
    chinese = rng.random() < 0.1
    names = [concepts[item.subject].zh if chinese else concepts[item.subject].label for item in layout.objects]
    if layout.is_single:
        return f"image: {names[0]}"
    places = [f"{CELLS[item.cell or 0]} {name}" for item, name in zip(layout.objects, names)]
    return f"image: {', '.join(places)}"


def _repetition(rng: np.random.Generator, concepts: Sequence[Concept]) -> str:
    """Two to six names, and the same names again."""
    chosen = rng.choice(len(concepts), size=int(rng.integers(2, 7)), replace=False).tolist()
    names = ", ".join(concepts[index].label for index in chosen)
    return f"{names}\n{names}"


def _fact(rng: np.random.Generator, concepts: Sequence[Concept]) -> str:
    """A sentence or two about a concept."""
    index, other = rng.choice(len(concepts), size=2, replace=False).tolist()
    concept = concepts[index]
    kind = KINDS_OF_THINGS[concept.subgroup]
    same = "also" if KINDS_OF_THINGS[concepts[other].subgroup] == kind else "not"
    sentences = [
        f"{with_article(concept.label)} is {with_article(kind)}.",
        f"{concept.label} is {concept.zh} in Chinese.",
        f"{concept.zh}: {concept.label}",
        f"{with_article(concept.label)} is {with_article(kind)}, {with_article(concepts[other].label)} is {same} one.",
        f"{concept.label} to the left of {concepts[other].label}: {concepts[other].label} to the right of {concept.label}",
        f"{concept.label} above {concepts[other].label}: {concepts[other].label} below {concept.label}",
        f"{concept.label}, {concepts[other].label}: 2 objects",
    ]
    return sentences[int(rng.integers(len(sentences)))]
