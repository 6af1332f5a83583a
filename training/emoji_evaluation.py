"""What libra-tiny knows of its world: all kinds of questions, drawings of names, reconstructions.

**Images.** Two sources: the drawings of the training vendors in new layouts (split "validation"), and those of a vendor
that nothing was trained on (split "test"). 500 images each by default, always the same: 200 singles, every concept
twice, and 300 grids, 100 each with one, two and three objects of random concepts in random cells. The grounds are white or
pastel, half and half; the drawings are not changed.

**Questions.** One of each kind an image, as [`~training.world.questions.scene_questions`] asks them, and the caption once more
without its prompt, in the chat template, answered greedily. An answer is right when it is exactly the right one.

**Chance.** What the best answer given without looking at the image is expected to score: any one label for names, `nothing`
for cells, `yes` for F1 (a coin scores 0.5), one letter. For the PSNR it is that of a plain image of the mean colour.

**Intervals** are 95%: Wilson for shares, a bootstrap for F1, normal for the PSNR.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from modeling_libra.cache_libra import CACHE_NAME

from .emoji_drawing import Recogniser, draw_captions, reconstruct
from .scores import Score, accuracy, f1, mean
from .world.concepts import Concept, drawn_concepts, load_subjects
from .world.icons import UNSEEN_VENDOR, present_vendors
from .world.questions import BARE_CAPTION, Question, scene_questions
from .world.scenes import CELLS, SPLITS, Scene, World, evaluation_images

NUM_IMAGES = 500
"""Images of each source."""

SINGLES_SHARE = 0.4
MAX_PICTURES = 100
"""Most pictures that are drawn, and most singles and grids that are reconstructed."""

SOURCES = ("train_vendors", "unseen_vendor")


@dataclass(frozen=True)
class Case:
    """
    A question about one of the images.

    Args:
        image (`int`): index of the image.
        single (`bool`): whether it shows one object that fills it.
        question ([`Question`]): what is asked, and the right answer.
    """

    image: int
    single: bool
    question: Question


@dataclass(frozen=True)
class Task:
    """
    A row of the results.

    Args:
        title (`str`): what it is called.
        kind (`str`): of the questions, see [`Question`], or `"describe"`.
        single (`bool`): whether of singles or of grids.
        chance (`Callable`): maps the number of concepts to what can be had without looking.
        metric (`str`, *optional*, defaults to `"accuracy"`): or `"f1"`.
        filled (`bool`, *optional*, defaults to `False`): only questions about cells that hold something.
    """

    title: str
    kind: str
    single: bool
    chance: Callable[[int], float]
    metric: str = "accuracy"
    filled: bool = False


TASKS = {
    "label": Task("single object named", "label", True, lambda n: 1 / n),
    "cell": Task("grid: object in a named cell", "cell", False, lambda n: 1 / n, filled=True),
    "count": Task("grid: how many objects", "count", False, lambda n: 1 / 3),
    "place": Task("grid: where is an object", "place", False, lambda n: 1 / len(CELLS)),
    "exists_f1": Task("grid: is there an object, F1", "exists", False, lambda n: 2 / 3, metric="f1"),
    "choice": Task("single: multiple choice of 4, the letter alone", "choice", True, lambda n: 1 / 4),
    "choice_named": Task("single: multiple choice of 4, named first", "choice_named", True, lambda n: 1 / 4),
    "choice_grid": Task("grid: multiple choice of 4, the letter alone", "choice", False, lambda n: 1 / 4),
    "choice_named_grid": Task("grid: multiple choice of 4, named first", "choice_named", False, lambda n: 1 / 4),
    "caption": Task("grid: caption exactly right", "caption", False, lambda n: 1 / 3 / n),
    "exists_zh": Task("grid: yes/no in Chinese", "exists_zh", False, lambda n: 1 / 2),
    "cell_any": Task("grid: what is in a cell, empty ones too", "cell", False, lambda n: 0.3),
    "exists": Task("grid: yes/no, accuracy", "exists", False, lambda n: 1 / 2),
    "exists_f1_single": Task("single: yes/no, F1", "exists", True, lambda n: 2 / 3, metric="f1"),
    "exists_zh_single": Task("single: yes/no in Chinese", "exists_zh", True, lambda n: 1 / 2),
    "count_single": Task("single: how many objects", "count", True, lambda n: 1.0),
    "caption_single": Task("single: caption exactly right", "caption", True, lambda n: 1 / n),
    "describe": Task('grid: "Describe the image.", exactly right', "describe", False, lambda n: 1 / 3 / n),
    "describe_single": Task('single: "Describe the image.", exactly right', "describe", True, lambda n: 1 / n),
}
"""The questions by the name of their result. One third of the grids have each number of objects, 30% of the cells asked for
are empty, and `1` is always right in singles."""

DRAWN, RECONSTRUCTED, REAL, PSNR = "drawn", "teacher_on_reconstructions", "teacher_on_images", "psnr"

TITLES = {name: task.title for name, task in TASKS.items()} | {
    DRAWN: "drawn from its name, recognised by the teacher",
    REAL: "the teacher on the images themselves",
    RECONSTRUCTED: "the teacher on reconstructions",
    PSNR: "PSNR of reconstructions, dB",
}
"""What the results are called, in their order."""

TEMPERATURE = 0.2
"""Of the drawings: things are drawn as they were learned, with little chance."""

MAIN = (
    *("label", "cell", "count", "place", "exists_f1", "choice", "choice_named", "choice_grid", "caption", "exists_zh"),
    *(DRAWN, PSNR),
)
"""The results that say how good the model is; the others explain them."""


def evaluate_emoji(
    model: str | Path,
    icons: str | Path,
    num_images: int = NUM_IMAGES,
    batch_size: int = 50,
    temperature: float = TEMPERATURE,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """
    Measures a Libra in the world of emoji.

    Args:
        model (`str` or `Path`): folder or Hub repo of a Libra; it is loaded as its users load it, with its own code.
        icons (`str` or `Path`): folder with the iconify JSON files.
        num_images (`int`, *optional*, defaults to 500): images of each source, at least 10.
        batch_size (`int`, *optional*, defaults to 50): images at a time.
        temperature (`float`, *optional*, defaults to 0.2): of the drawings.
        only (`Sequence` of `str`, *optional*): results that are wanted, of [`TITLES`]; by default all.

    Returns:
        `dict`: `model`, `num_images`, `temperature`, `seconds`, and `results`: by name, in the order of [`TITLES`], a
        `dict` with the `title`, `train_vendors` and `unseen_vendor` (each `value`, `low`, `high`, `count`, or None where a
        result does not depend on the vendor) and `chance`.

    Raises:
        ValueError: if there are too few images, or a result is unknown.
    """
    if num_images < 10:
        raise ValueError(f"num_images is {num_images}, expected at least 10.")
    unknown = sorted(set(only or ()) - TITLES.keys())
    if unknown:
        raise ValueError(f"There is no result {', '.join(unknown)}; choose from {', '.join(TITLES)}.")
    start = time.monotonic()
    icons = Path(icons)
    concepts = drawn_concepts(icons, (UNSEEN_VENDOR,))
    libra = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    wanted = list(TITLES) if not only else [name for name in TITLES if name in only]
    known = load_subjects(concepts, present_vendors(icons), icons)
    worlds = {
        "train_vendors": World(known, "validation", num_images),
        "unseen_vendor": World(load_subjects(concepts, (UNSEEN_VENDOR,), icons), "test", num_images),
    }
    scores: dict[str, dict[str, Score]] = {name: {} for name in wanted}
    chances = {name: task.chance(len(concepts)) for name, task in TASKS.items()}
    chances |= dict.fromkeys((DRAWN, RECONSTRUCTED, REAL), 1 / len(concepts))
    tasks = {name: task for name, task in TASKS.items() if name in wanted}
    pictures = [name for name in (RECONSTRUCTED, REAL, PSNR) if name in wanted]
    recognise = Recogniser.of(known) if {DRAWN, RECONSTRUCTED, REAL} & set(wanted) else None
    plain: list[float] = []
    for source, world in worlds.items():
        scenes = exam_scenes(world)
        cases = exam_cases(scenes, concepts, tasks)
        answers = ask(libra, processor, scenes, cases, batch_size, source) if cases else []
        for name, task in tasks.items():
            scores[name][source] = score(task, cases, answers)
        if pictures:
            found, plain_psnr = measure_pictures(processor, scenes, recognise)
            plain += plain_psnr
            for name in pictures:
                scores[name][source] = found[name]
    if PSNR in wanted:
        chances[PSNR] = float(np.mean(plain))
    if DRAWN in wanted:
        assert recognise is not None
        labels = [concept.label for concept in concepts]
        images = draw_captions(libra, processor, labels, temperature)
        named = recognise(images)
        scores[DRAWN]["train_vendors"] = accuracy([found == index for index, found in enumerate(named)])
    results = {
        name: {
            "title": TITLES[name],
            **{source: asdict(of[source]) if source in of else None for source in SOURCES},
            "chance": chances[name],
        }
        for name, of in scores.items()
    }
    return {
        "model": str(model),
        "num_images": num_images,
        "temperature": temperature,
        "seconds": round(time.monotonic() - start, 1),
        "results": results,
    }


def exam_scenes(world: World) -> list[Scene]:
    """
    The images of a source: two fifths singles, each subject in turn, then grids with one, two, three objects in turn.

    Args:
        world ([`World`]): whose subjects, seed, split and length are used.

    Returns:
        `list` of [`Scene`]: `len(world)` images, the same at every call.
    """
    num_singles = round(SINGLES_SHARE * len(world))
    scenes = evaluation_images(world, num_singles)
    for index in range(len(world) - num_singles):
        rng = np.random.default_rng([world.seed, SPLITS[world.split], 2_000_000 + index])
        count = 1 + index % 3
        cells = sorted(rng.choice(len(CELLS), size=count, replace=False).tolist())
        subjects = rng.choice(len(world.subjects), size=count, replace=False).tolist()
        scenes.append(world.draw(world.arrange(subjects, cells, rng), rng))
    return scenes


def exam_cases(scenes: Sequence[Scene], concepts: Sequence[Concept], tasks: dict[str, Task]) -> list[Case]:
    """
    The questions of some tasks, one of each kind an image, always the same.

    Args:
        scenes (`Sequence` of [`Scene`]): the images.
        concepts (`Sequence` of [`Concept`]): what can be asked for.
        tasks (`dict` of [`Task`]): which kinds are wanted.

    Returns:
        `list` of [`Case`]: image by image.
    """
    kinds = {(task.kind, task.single) for task in tasks.values()}
    return [
        Case(index, scene.is_single, question)
        for index, scene in enumerate(scenes)
        for question in _exam_questions(scene, index, concepts)
        if (question.kind, scene.is_single) in kinds
    ]


def _exam_questions(scene: Scene, index: int, concepts: Sequence[Concept]) -> list[Question]:
    questions = scene_questions(scene, np.random.default_rng([7, index]), concepts)
    caption = next(question for question in questions if question.kind == "caption")
    return [*questions, replace(caption, kind="describe", question=BARE_CAPTION)]


@torch.inference_mode()
def ask(
    model: Any, processor: Any, scenes: Sequence[Scene], cases: Sequence[Case], batch_size: int, name: str = ""
) -> list[str]:
    """
    Greedy answers. What all questions about an image begin with (system message and image) is read once, and stays in the
    cache.

    Args:
        model ([`LibraForCausalLM`]): answers.
        processor ([`LibraProcessor`]): of the same repository.
        scenes (`Sequence` of [`Scene`]): the images.
        cases (`Sequence` of [`Case`]): the questions, no two of a kind about an image.
        batch_size (`int`): images at a time.
        name (`str`, *optional*, defaults to `""`): of the images, for the progress that is shown.

    Returns:
        `list` of `str`: an answer a question, without white space around it.
    """
    numbers: dict[int, dict[str, int]] = {}  # of the questions about each image, by kind
    longest: dict[str, int] = {}  # tokens of the longest right answer of a kind
    for number, case in enumerate(cases):
        kind, answer = case.question.kind, case.question.answer
        numbers.setdefault(case.image, {})[kind] = number
        length = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
        longest[kind] = max(longest.get(kind, 0), length)
    images_by_kinds: dict[tuple[str, ...], list[int]] = {}
    for image, by_kind in numbers.items():
        images_by_kinds.setdefault(tuple(by_kind), []).append(image)
    answers = [""] * len(cases)
    done = 0
    for kinds, images in images_by_kinds.items():
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            shown = [scenes[image] for image in chunk]
            asked = {kind: [numbers[image][kind] for image in chunk] for kind in kinds}
            questions = {kind: [cases[number].question for number in asked[kind]] for kind in kinds}
            lengths = {kind: longest[kind] + 2 for kind in kinds}  # the end, and one more to see what is too long
            for kind, texts in _answers_about(model, processor, shown, questions, lengths).items():
                for number, text in zip(asked[kind], texts, strict=True):
                    answers[number] = text
                done += len(texts)
                print(f"\r{name}: {done} of {len(cases)} questions", end="", flush=True)
    print()
    return answers


def _answers_about(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    questions: dict[str, list[Question]],
    max_new_tokens: dict[str, int],
) -> dict[str, list[str]]:
    """Answers to questions of several kinds, each a question a scene."""
    pixels = processor.image_processor(images=[scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    codes, features = processor.image_tokenizer.encode(pixels)  # (n, patches, codebooks), (n, patches, width)
    prompts = {kind: _prompts(processor, scenes, of_kind) for kind, of_kind in questions.items()}
    first = next(iter(prompts.values()))
    beginning = torch.stack([ids[: _end_of_image(processor, ids)] for ids in first])  # (n, common length)
    common = beginning.shape[1]
    beginning[:, common - 2 - codes.shape[1] : common - 2] = processor.codes_to_ids(codes)
    cache = DynamicCache(config=model.config)
    model(input_ids=beginning, image_features=features.float(), past_key_values=cache, use_cache=True, logits_to_keep=1)
    texts = {}
    for kind, rows in prompts.items():
        rest = [ids[common:] for ids in rows]
        width = max(len(ids) for ids in rest)
        padding = torch.tensor([width - len(ids) for ids in rest])
        ids = torch.stack([F.pad(ids, (width - len(ids), 0), value=processor.tokenizer.pad_token_id) for ids in rest])
        mask = torch.cat([torch.ones_like(beginning), torch.arange(width) >= padding[:, None]], dim=1)
        written = model.generate(
            input_ids=torch.cat([beginning, ids], dim=1),
            attention_mask=mask,
            max_new_tokens=max_new_tokens[kind],
            do_sample=False,
            **{CACHE_NAME: cache},
        )
        cache.crop(common - cache.get_seq_length())  # back to what all questions begin with
        found = processor.batch_decode(written[:, mask.shape[1] :], skip_special_tokens=True)
        texts[kind] = [text.strip() for text in found]
    return texts


def _end_of_image(processor: Any, ids: torch.Tensor) -> int:
    """Where a prompt goes on after its image and the newline behind it."""
    return int((ids == processor.eoi_token_id).nonzero()[0, 0]) + 2


def _prompts(processor: Any, scenes: Sequence[Scene], questions: Sequence[Question]) -> list[torch.Tensor]:
    """Ids of prompts, `(length,)` each, in which every code of the image is a placeholder."""
    conversations = []
    for scene, question in zip(scenes, questions, strict=True):
        parts = [{"type": "image", "image": scene.image}, {"type": "text", "text": question.question}]
        conversations.append([{"role": "user", "content": parts}])
    options = {"tokenize_images": False, "add_special_tokens": False}  # the template writes special tokens
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
    )
    return [torch.tensor(ids) for ids in inputs["input_ids"]]


def score(task: Task, cases: Sequence[Case], answers: Sequence[str]) -> Score:
    """
    The score of a task.

    Args:
        task ([`Task`]): which questions count, and how.
        cases (`Sequence` of [`Case`]): questions, those of other tasks too.
        answers (`Sequence` of `str`): an answer each.

    Raises:
        ValueError: if none of the questions is of the task.
    """
    pairs = [
        (answer, case.question.answer)
        for case, answer in zip(cases, answers, strict=True)
        if (case.question.kind, case.single) == (task.kind, task.single)
        and not (task.filled and case.question.answer == "nothing")
    ]
    if task.metric == "f1":
        return f1([given == "yes" for given, _ in pairs], [right == "yes" for _, right in pairs])
    return accuracy([given == right for given, right in pairs])


def measure_pictures(
    processor: Any, scenes: Sequence[Scene], recognise: Recogniser | None
) -> tuple[dict[str, Score], list[float]]:
    """
    Reconstructions of the first 100 singles (each concept once) and the first 100 grids.

    Args:
        processor ([`LibraProcessor`]): whose image tokenizer is measured.
        scenes (`Sequence` of [`Scene`]): images of a source, singles first.
        recognise ([`Recogniser`], *optional*): names singles; without it only the PSNR is measured.

    Returns:
        `tuple`: the scores by name, and the PSNR of plain images (see [`reconstruct`]).
    """
    singles = [scene for scene in scenes if scene.is_single][:MAX_PICTURES]
    grids = [scene for scene in scenes if not scene.is_single][:MAX_PICTURES]
    images = [scene.image for scene in (*singles, *grids)]
    reconstructions, decibels, plain = reconstruct(processor, images)
    found = {PSNR: mean(decibels.tolist())}
    if recognise is not None:
        wanted = [scene.objects[0].subject for scene in singles]
        for name, pictures in ((REAL, images), (RECONSTRUCTED, reconstructions)):
            named = recognise(pictures[: len(singles)])
            found[name] = accuracy([given == right for given, right in zip(named, wanted)])
    return found, plain.tolist()


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """
    The results as a Markdown table.

    Args:
        results (`dict`): `results` of [`evaluate_emoji`].

    Returns:
        `str`: a row a result: training vendors and unseen vendor with their intervals, chance.
    """
    rows = ["| task | training vendors | unseen vendor | chance |", "|---|---|---|---|"]
    for name, result in results.items():
        cells = [_cell(name, result[source]) for source in SOURCES]
        rows.append(f"| {result['title']} | {' | '.join(cells)} | {_number(name, result['chance'])} |")
    return "\n".join(rows)


def _cell(name: str, found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{_number(name, found['value'])} ({_number(name, found['low'])}-{_number(name, found['high'])})"


def _number(name: str, value: float) -> str:
    if name == PSNR:
        return f"{value:.1f}"
    if "f1" in name:
        return f"{value:.2f}"
    return f"{value:.1%}"
