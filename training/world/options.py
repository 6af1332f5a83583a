"""Lists of options and the letters of their names, which the language model learns on text before it chooses in images."""

from collections.abc import Sequence

import numpy as np

from .concepts import Concept
from .questions import LETTERS, Question, list_options

NAMES_ASKED = 8
"""Names whose letters are asked for: many, for one letter a question teaches little; the same ones come again."""
SHORT_NAME = 6
"""Characters of a short name, at most: most of these are one piece of the text tokenizer, and learned first."""


def ask_for_letters(rng: np.random.Generator, concepts: Sequence[Concept]) -> Question:
    """
    Which letters the options of a list have, without anything to look at.

    Args:
        rng (`np.random.Generator`): Chooses two to eight options, and which are asked for.
        concepts (`Sequence[Concept]`): The concepts, at least two; three tenths of the lists have short names alone if
            there are as many.

    Returns:
        `Question`: Of the kind `"letters"`; its answer is each name with its letter, `"horse: A, key: C"`.
    """
    count = int(rng.integers(2, min(len(LETTERS), len(concepts)) + 1))
    short = [concept for concept in concepts if len(concept.label) <= SHORT_NAME]
    pool = short if len(short) >= count and rng.random() < 0.3 else concepts
    chosen = rng.choice(len(pool), size=count, replace=False).tolist()
    labels = [pool[i].label for i in chosen]
    asked = rng.integers(count, size=NAMES_ASKED).tolist()
    question = f"{list_options(labels)}\nWhich options are {', '.join(labels[i] for i in asked)}?"
    return Question("letters", question, ", ".join(f"{labels[i]}: {LETTERS[i]}" for i in asked))
