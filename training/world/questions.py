"""Questions about scenes and their answers, each followed by the prompt the paper has for its kind (Table 6)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .concepts import Concept, load_concepts
from .scenes import CELLS, Layout

PROMPT_SHORT = "Answer the question using a single word or phrase."
"""Follows questions that have a short answer."""

PROMPT_CHOICE = "Answer with the option's letter from the given choices directly."
"""Follows questions with options."""

PROMPT_CHOICE_NAMED = "Name it, then answer with the option's letter."
"""Follows questions with options, too; not of the paper. Who names the thing first looks up the letter of a name that is
written, which a model of few layers learns by itself; to look up that of one that it has in mind it is taught
([`~training.unspoken`])."""

PROMPT_CAPTION = "Provide a one-sentence caption for the provided image."
"""Asks for a caption."""

BARE_CAPTION = "Describe the image."
"""Asks for one, too, as users do who do not know the prompt."""

PROMPT_SHORT_ZH = "请直接回答。"
"""Follows questions in Chinese."""

LETTERS = "ABCDEFGH"
"""Letters of options, as many as there can be."""

NUM_OPTIONS = 4
"""Options of a question."""

SINGLE_KINDS = ("caption", "count", "exists", "exists_zh", "label", "choice", "choice_named")
"""Kinds of questions about a single."""

GRID_KINDS = ("caption", "count", "exists", "exists_zh", "cell", "place", "choice", "choice_named")
"""Kinds of questions about a grid."""


@dataclass(frozen=True)
class Question:
    """
    A question about a scene.

    Args:
        kind (`str`): One of [`SINGLE_KINDS`] or [`GRID_KINDS`], or `"letters"`, about options alone.
        question (`str`): The whole of what the user asks, with its prompt.
        answer (`str`): The one right answer.
        names (`frozenset[int]`, *optional*): The concepts that the question names, by index; not those of its answer.
    """

    kind: str
    question: str
    answer: str
    names: frozenset[int] = frozenset()


def without_prompt(question: str) -> str:
    """
    What a user may ask who does not know the prompts: `question` less its last line; a caption is asked for in other words
    ([`BARE_CAPTION`]). The letter alone is only for who asks for it: options without a prompt are answered with the name
    first.
    """
    if question == PROMPT_CAPTION:
        return BARE_CAPTION
    asked, _, prompt = question.rpartition("\n")
    return question if prompt == PROMPT_CHOICE else asked


def with_article(label: str) -> str:
    """`"a horse"`, `"an ant"`."""
    return f"{'an' if label[0].lower() in 'aeiou' else 'a'} {label}"


def scene_questions(
    scene: Layout, rng: np.random.Generator, concepts: Sequence[Concept] | None = None, similar: float = 1.0
) -> list[Question]:
    """
    One question of each kind that fits a scene.

    Args:
        scene ([`Layout`]): The scene; the subjects of its objects must be concepts.
        rng (`np.random.Generator`): Chooses what is asked.
        concepts (`Sequence[Concept]`, *optional*): The concepts; by default the 100 of the world.
        similar (`float`, *optional*, defaults to 1.0):
            Share of the absent things in yes/no questions that are chosen from the group of a present one; the others
            are any.

    Returns:
        `list[Question]`: In a fixed order of kinds.
    """
    concepts = load_concepts() if concepts is None else concepts
    questions = [
        Question("caption", PROMPT_CAPTION, scene.caption),
        _short("count", "How many objects are there?", str(len(scene.objects))),
        _exists(scene, rng, concepts, similar),
        _exists_zh(scene, rng, concepts, similar),
    ]
    if scene.is_single:
        questions.append(_short("label", "What is in the image?", concepts[scene.objects[0].subject].label))
    else:
        questions.append(_cell(scene, rng, concepts))
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        place = CELLS[item.cell or 0]
        where = f"Where is the {concepts[item.subject].label}?"
        questions.append(_short("place", where, place, {item.subject}))
    return questions + choice_questions(scene, rng, concepts)


def choice_questions(scene: Layout, rng: np.random.Generator, concepts: Sequence[Concept]) -> list[Question]:
    """
    What is in the image, with options, in both forms. One thing of the image is among them; the others are not there.

    Args:
        scene ([`Layout`]): What is asked about.
        rng (`np.random.Generator`): Chooses the options and their order.
        concepts (`Sequence[Concept]`): The concepts, of which the image must lack `NUM_OPTIONS - 1` or more.

    Returns:
        `list[Question]`: As of [`choices_of`].
    """
    present = [item.subject for item in scene.objects]
    right = present[int(rng.integers(len(present)))]
    options = [right, *_distractors(right, present, NUM_OPTIONS - 1, rng, concepts, same_group=0.5)]
    order = rng.permutation(NUM_OPTIONS).tolist()
    labels = [concepts[options[i]].label for i in order]
    return choices_of(labels, order.index(0), frozenset(options))


def wrong_answer(scene: Layout, question: Question, rng: np.random.Generator, concepts: Sequence[Concept]) -> str:
    """
    An answer of the right form that is wrong.

    Args:
        scene ([`Layout`]): What is asked about.
        question ([`Question`]): Of the kind `"label"` or `"place"`.
        rng (`np.random.Generator`): Chooses the answer.
        concepts (`Sequence[Concept]`): The concepts.

    Returns:
        `str`: The name of something else, of the same group if there is any, or another cell.

    Raises:
        ValueError: If the question is of another kind.
    """
    if question.kind == "label":
        subject = scene.objects[0].subject
        return concepts[_distractors(subject, [subject], 1, rng, concepts, same_group=1.0)[0]].label
    if question.kind == "place":
        others = [cell for cell in CELLS if cell != question.answer]
        return others[int(rng.integers(len(others)))]
    raise ValueError(f"There are no wrong answers to questions of the kind {question.kind!r}.")


def _short(kind: str, question: str, answer: str, names: Iterable[int] = ()) -> Question:
    return Question(kind, f"{question}\n{PROMPT_SHORT}", answer, frozenset(names))


def _cell(scene: Layout, rng: np.random.Generator, concepts: Sequence[Concept]) -> Question:
    """What is in a cell: seven times of ten one with an object, if there are both kinds."""
    by_cell = {item.cell: concepts[item.subject].label for item in scene.objects}
    filled = [cell for cell in range(len(CELLS)) if cell in by_cell]
    empty = [cell for cell in range(len(CELLS)) if cell not in by_cell]
    pool = filled if not empty or rng.random() < 0.7 else empty
    cell = pool[int(rng.integers(len(pool)))]
    return _short("cell", f"What is in the {CELLS[cell]}?", by_cell.get(cell, "nothing"))


def _asked_concept(
    scene: Layout, rng: np.random.Generator, concepts: Sequence[Concept], similar: float
) -> tuple[int, bool]:
    """A concept to ask for and whether it is there, half and half; an absent one may be of a present one's group."""
    present = [item.subject for item in scene.objects]
    item = present[int(rng.integers(len(present)))]
    if rng.random() < 0.5:
        return item, True
    return _distractors(item, present, 1, rng, concepts, same_group=similar)[0], False


def _distractors(
    subject: int,
    excluded: Sequence[int],
    count: int,
    rng: np.random.Generator,
    concepts: Sequence[Concept],
    same_group: float,
) -> list[int]:
    """Other concepts, each from the same group as `subject` with the given probability as long as there are any."""
    chosen: list[int] = []
    while len(chosen) < count:
        others = [i for i in range(len(concepts)) if i not in excluded and i not in chosen]
        similar = [i for i in others if concepts[i].group == concepts[subject].group]
        pool = similar if similar and rng.random() < same_group else others
        chosen.append(pool[int(rng.integers(len(pool)))])
    return chosen


def _exists(scene: Layout, rng: np.random.Generator, concepts: Sequence[Concept], similar: float) -> Question:
    asked, present = _asked_concept(scene, rng, concepts, similar)
    question = f"Is there {with_article(concepts[asked].label)} in the image?"
    return _short("exists", question, "yes" if present else "no", {asked})


def _exists_zh(scene: Layout, rng: np.random.Generator, concepts: Sequence[Concept], similar: float) -> Question:
    asked, present = _asked_concept(scene, rng, concepts, similar)
    question = f"图中有{concepts[asked].zh}吗？\n{PROMPT_SHORT_ZH}"
    return Question("exists_zh", question, "有" if present else "没有", frozenset({asked}))


def choices_of(labels: Sequence[str], right: int, names: frozenset[int] = frozenset()) -> list[Question]:
    """
    What is in the image, with the same options twice: to be answered with the letter, and with the name and the letter.

    Args:
        labels (`Sequence[str]`): The options, at most eight.
        right (`int`): Which of them is in the image.
        names (`frozenset[int]`, *optional*): As of [`Question`].

    Returns:
        `list[Question]`: Of the kinds `"choice"` and `"choice_named"`.
    """
    asked = f"What is in the image?\n{list_options(labels)}"
    return [
        Question("choice", f"{asked}\n{PROMPT_CHOICE}", LETTERS[right], names),
        Question("choice_named", f"{asked}\n{PROMPT_CHOICE_NAMED}", f"{labels[right]}: {LETTERS[right]}", names),
    ]


def list_options(labels: Sequence[str]) -> str:
    """At most eight options with their letters, each in a line of its own: `"A. horse"`."""
    return "\n".join(f"{letter}. {label}" for letter, label in zip(LETTERS, labels, strict=False))
