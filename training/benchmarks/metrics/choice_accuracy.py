"""Multiple choice: which option's letter an answer in free text means (ScienceQA-IMG, SEED, MMVP, MMBench).

Of these the first that finds exactly one option decides; an answer that none decides is wrong:

1. the whole answer is a letter: `B`, `b`, `(B)`, `B.`
2. it begins with a letter and a mark: `B. a horse`, `(B) a horse`, `B: ...`, or ends a phrase as in `the answer is B`,
   `Option B`, `答案是B`
3. an option's text is the answer, or the only one that is in it: `It is a horse.`
4. a single capital letter stands alone in it: `I choose B`; `A` does not count in more than three words, as an article

Letters that name no option count for nothing.
"""

import re
from collections.abc import Sequence
from string import ascii_uppercase

import datasets
import evaluate

PHRASE = re.compile(
    r"(?i:answer|option|choice|答案|选项|选择?)\s*(?i:is|are|:|：|是|为)?\s*"
    r"(?:[(（](?P<bracketed>[A-Za-z])[)）]|(?P<capital>[A-Z])(?![A-Za-z])|(?P<last>[a-z])\W*$)"  # not "is a horse"
)
ENDS = ".。!！"
SPACED = "0-9A-Za-z_\u00c0-\u1fff"
"""Letters of scripts that part words by spaces, as Chinese does not."""


def option_letter(answer: str, options: int | Sequence[str] = 4) -> str | None:
    """
    The option an answer means.

    Args:
        answer (`str`): of the model.
        options (`int` or `Sequence` of `str`, *optional*, defaults to 4): their texts, or how many there are.

    Returns:
        `str`: a capital letter, or None if no option or several are meant.

    Raises:
        ValueError: if there are no options, or more than letters.
    """
    texts = [] if isinstance(options, int) else list(options)
    count = options if isinstance(options, int) else len(texts)
    if not 1 <= count <= len(ascii_uppercase):
        raise ValueError(f"There must be 1 to {len(ascii_uppercase)} options, found {count}.")
    letters = ascii_uppercase[:count]
    answer = answer.strip()
    whole = re.fullmatch(r"[(（\[]?([A-Za-z])[)）\].:：,。]*", answer)
    start = re.match(r"[(（\[]?([A-Z])[)）\].:：、,]", answer)
    for found in (whole, start, PHRASE.search(answer)):
        letter = found and found[found.lastgroup or 1].upper()
        if letter and letter in letters:
            return letter
    return _by_text(answer, texts) or _standing_alone(answer, letters)


def _by_text(answer: str, texts: Sequence[str]) -> str | None:
    plain = answer.lower().rstrip(ENDS)
    wanted = [text.strip().lower().rstrip(ENDS) for text in texts]
    if wanted.count(plain) == 1:
        return ascii_uppercase[wanted.index(plain)]
    inside = [place for place, text in enumerate(wanted) if text and _is_in(text, plain)]
    return ascii_uppercase[inside[0]] if len(inside) == 1 else None


def _is_in(text: str, answer: str) -> bool:
    """Whether a text is in an answer as whole words."""
    before = rf"(?<![{SPACED}])" if re.match(f"[{SPACED}]", text[0]) else ""
    after = rf"(?![{SPACED}])" if re.match(f"[{SPACED}]", text[-1]) else ""
    return re.search(before + re.escape(text) + after, answer) is not None


def _standing_alone(answer: str, letters: str) -> str | None:
    found = set(re.findall(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])", answer)) & set(letters)
    if "A" in found and len(answer.split()) > 3:
        found.discard("A")
    return found.pop() if len(found) == 1 else None


class ChoiceAccuracy(evaluate.Metric):
    """`compute(predictions, references, options=4)`: answers, letters; options of each question, or how many."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: str; references: a letter; options: int, or a list of str a question.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], options: int | Sequence[Sequence[str]] = 4
    ) -> dict[str, float]:
        offered: Sequence[int | Sequence[str]]
        offered = [options] * len(references) if isinstance(options, int) else options
        letters = [option_letter(text, of) for text, of in zip(predictions, offered, strict=True)]
        right = [found == wanted.strip().upper() for found, wanted in zip(letters, references, strict=True)]
        return {
            "accuracy": sum(right) / len(right),
            "no_letter": sum(found is None for found in letters) / len(letters),
        }
