"""easy-VQA: one coloured shape an image, 13 answers, an official split of 4000 and 1000 images (38575 and 9673 questions).

    python -m training.benchmarks.easy_vqa data runs/easy_vqa/data
    libra train sft --config training/configs/tiny/easy_vqa.yaml --model hub_configs/libra-tiny \\
        --dataset runs/easy_vqa/data/train.json
    python -m training.benchmarks.easy_vqa evaluate runs/easy_vqa/sft --output runs/easy_vqa/results.json

Images and questions come in the package `easy-vqa` (Zhou 2019, https://github.com/vzhou842/easy-VQA), so nothing is
downloaded. Every question is followed by the paper's prompt for short answers (Table 6), answered greedily, and right
when the answer is exactly the right one of the 13.

**Without looking.** Always the commonest answer of the training split, and for each question the commonest answer that
the training split has to these words: questions ask mostly for what is not there, so that "is there a red shape?" is
answered well by "no".
"""

import argparse
import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
from PIL import Image

from libra_cli.loading import load_libra, to_accelerator

from ..emoji_evaluation import Case, ask
from ..scores import Score, accuracy
from ..world.questions import PROMPT_SHORT, Question
from ..world.scenes import Scene

MAX_TURNS = 8
"""Most questions of a conversation; an image with more has several conversations."""

ALL = "all"
"""The row of all questions in the results."""


@dataclass(frozen=True)
class EasyQuestion:
    """
    A question of easy-VQA.

    Args:
        image (`int`): number of its image in the split.
        question (`str`): as the package has it.
        answer (`str`): the right one.
    """

    image: int
    question: str
    answer: str

    @property
    def kind(self) -> str:
        """`"shape"`, `"colour"`, `"yes/no"`, or `"yes/no, negated"` for those that ask whether something is not there."""
        if self.answer in ("yes", "no"):
            negated = " not " in self.question or self.question.startswith("is no ")
            return "yes/no, negated" if negated else "yes/no"
        return "colour" if " color " in self.question else "shape"

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"{self.question}\n{PROMPT_SHORT}"


def load_questions(split: str) -> list[EasyQuestion]:
    """
    The questions of a split.

    Args:
        split (`str`): `"train"` or `"test"`.

    Returns:
        `list` of [`EasyQuestion`]: 38575 or 9673, in the order of the package.

    Raises:
        ValueError: for another split.
    """
    _check_split(split)
    columns = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    return [EasyQuestion(image, question, answer) for question, answer, image in zip(*columns, strict=True)]


def image_files(split: str) -> dict[int, Path]:
    """
    The images of a split.

    Args:
        split (`str`): `"train"` or `"test"`.

    Returns:
        `dict`: a PNG file of 64 x 64 pixels by number.

    Raises:
        ValueError: for another split.
    """
    _check_split(split)
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    return {number: Path(path) for number, path in sorted(paths.items())}


def write_training_data(folder: str | Path, max_turns: int = MAX_TURNS, seed: int = 0) -> Path:
    """
    Writes the training split as conversations, in the form of [`~training.conversations`]: `train.json` and `images/`.

    Each question is asked once. Those about an image are shuffled and dealt out evenly to as few conversations as
    `max_turns` allows, so that all kinds of questions come first in some of them, where nothing said before gives their answer away.

    Args:
        folder (`str` or `Path`): where to write; made if it is not there.
        max_turns (`int`, *optional*, defaults to 8): most questions of a conversation.
        seed (`int`, *optional*, defaults to 0): of the order of questions.

    Returns:
        `Path`: of `train.json`.

    Raises:
        ValueError: if `max_turns` is less than 1.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns must be at least 1, found {max_turns}.")
    rng = np.random.default_rng(seed)
    questions: dict[int, list[EasyQuestion]] = defaultdict(list)
    for question in load_questions("train"):
        questions[question.image].append(question)
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    samples = []
    for number, file in image_files("train").items():
        shutil.copyfile(file, images / file.name)
        order = rng.permutation(len(questions[number]))
        for part, places in enumerate(np.array_split(order, -(-len(order) // max_turns))):
            samples.append(
                {
                    "id": f"{number}-{part}",
                    "images": [f"images/{file.name}"],
                    "messages": _messages([questions[number][place] for place in places]),
                }
            )
    target = Path(folder) / "train.json"
    target.write_text(json.dumps(samples), encoding="utf-8")
    return target


def evaluate_easy_vqa(
    model: str | Path, num_images: int | None = None, batch_size: int = 50, seed: int = 0
) -> dict[str, Any]:
    """
    Asks a Libra the questions of the test split.

    Args:
        model (`str` or `Path`): folder or Hub repo.
        num_images (`int`, *optional*): how many of the 1000 images, drawn at random, with all their questions; by default
            all.
        batch_size (`int`, *optional*, defaults to 50): images at a time.
        seed (`int`, *optional*, defaults to 0): of the choice of images.

    Returns:
        `dict`: `model`, `num_images`, `seconds` and `results`: for all questions and for each kind (see
        [`EasyQuestion.kind`]) the score (`value`, `low`, `high`, `count`), and what is right without looking: `majority`
        and `by_words`, shares of the same questions.

    Raises:
        ValueError: if the model cannot be loaded, or `num_images` is not in [1, 1000].
    """
    files = image_files("test")
    if num_images is not None and not 1 <= num_images <= len(files):
        raise ValueError(f"num_images must be in [1, {len(files)}], found {num_images}.")
    start = time.monotonic()
    chosen = list(files)
    if num_images is not None:
        chosen = sorted(np.random.default_rng(seed).choice(chosen, size=num_images, replace=False).tolist())
    questions = [question for question in load_questions("test") if question.image in set(chosen)]
    libra, processor = to_accelerator(*load_libra(model))
    answers = _answers(libra, processor, [files[number] for number in chosen], chosen, questions, batch_size)
    return {
        "model": str(model),
        "num_images": len(chosen),
        "seconds": round(time.monotonic() - start, 1),
        "results": score_answers(questions, answers, load_questions("train")),
    }


def score_answers(
    questions: Sequence[EasyQuestion], answers: Sequence[str], training: Sequence[EasyQuestion]
) -> dict[str, dict[str, Any]]:
    """
    Scores answers, by kind of question.

    Args:
        questions (`Sequence` of [`EasyQuestion`]): what was asked.
        answers (`Sequence` of `str`): an answer each.
        training (`Sequence` of [`EasyQuestion`]): the training split, which says what is common.

    Returns:
        `dict`: as `results` of [`evaluate_easy_vqa`].
    """
    commonest = Counter(question.answer for question in training).most_common(1)[0][0]
    by_words: dict[str, Counter] = defaultdict(Counter)
    for question in training:
        by_words[question.question][question.answer] += 1
    blind = {words: counts.most_common(1)[0][0] for words, counts in by_words.items()}
    rows: dict[str, list[tuple[bool, bool, bool]]] = {ALL: []}
    for question, answer in zip(questions, answers, strict=True):
        right = question.answer
        row = (answer == right, commonest == right, blind.get(question.question, commonest) == right)
        rows[ALL].append(row)
        rows.setdefault(question.kind, []).append(row)
    results = {}
    for kind, hits in rows.items():
        found, majority, words = zip(*hits)
        results[kind] = {
            **asdict(accuracy(found)),
            "majority": accuracy(majority).value,
            "by_words": accuracy(words).value,
        }
    return results


def format_results(results: dict[str, dict[str, Any]]) -> str:
    """
    The results as a Markdown table.

    Args:
        results (`dict`): of [`evaluate_easy_vqa`].

    Returns:
        `str`: a row a kind of question, with 95% intervals.
    """
    rows = [
        "| questions | number | right | commonest answer | commonest answer to these words |",
        "|---|---|---|---|---|",
    ]
    for kind, found in results.items():
        score = Score(*(found[name] for name in ("value", "low", "high", "count")))
        rows.append(
            f"| {kind} | {score.count} | {score.value:.1%} ({score.low:.1%}-{score.high:.1%}) | {found['majority']:.1%} "
            f"| {found['by_words']:.1%} |"
        )
    return "\n".join(rows)


def _answers(
    libra: Any, processor: Any, files: list[Path], numbers: list[int], questions: list[EasyQuestion], batch_size: int
) -> list[str]:
    """Greedy answers. Images are encoded once: the questions about one count as different kinds, by their place."""
    scenes = []
    for file in files:
        with Image.open(file) as opened:
            scenes.append(Scene(objects=(), caption="", image=opened.convert("RGB")))  # only its image is used
    places: Counter[int] = Counter()
    cases = []
    index = {number: place for place, number in enumerate(numbers)}
    for question in questions:
        kind = str(places[question.image])
        places[question.image] += 1
        cases.append(Case(index[question.image], True, Question(kind, question.prompt, question.answer)))
    return ask(libra, processor, scenes, cases, batch_size, "easy-VQA")


def _messages(questions: Sequence[EasyQuestion]) -> list[dict[str, str]]:
    """Turns of a conversation; the prompt follows the first question only, as in LLaVA's data: it holds for the rest."""
    messages = []
    for place, question in enumerate(questions):
        messages.append({"role": "user", "content": question.question if place else question.prompt})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has the splits train and test, not {split!r}.")


def main(arguments: list[str] | None = None) -> None:
    """Writes the training data, or evaluates a model; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.benchmarks.easy_vqa", description="easy-VQA.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write the training split for instruction tuning")
    data.add_argument("folder", help="where to")
    data.add_argument("--max-turns", type=int, default=MAX_TURNS, help="questions of a conversation (default: 8)")
    data.add_argument("--seed", type=int, default=0, help="of the order of questions (default: 0)")
    evaluation = commands.add_parser("evaluate", help="measure a model on the test split")
    evaluation.add_argument("model", help="folder or Hub repo")
    evaluation.add_argument("--images", type=int, help="images drawn at random (default: all 1000)")
    evaluation.add_argument("--batch-size", type=int, default=50, help="images at a time (default: 50)")
    evaluation.add_argument("--output", type=Path, metavar="FILE.json", help="file for the numbers")
    options = parser.parse_args(arguments)
    if options.command == "data":
        print(f"Wrote {write_training_data(options.folder, options.max_turns, options.seed)}")
        return
    if options.output and not options.output.absolute().parent.is_dir():
        parser.error(f"there is no folder {options.output.parent} to write {options.output.name} into")
    report = evaluate_easy_vqa(options.model, options.images, options.batch_size)
    print(format_results(report["results"]))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
