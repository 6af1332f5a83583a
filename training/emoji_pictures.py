"""Pictures of a model card: what a Libra says to drawings, what it draws, and what its image tokenizer keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from .emoji_drawing import draw_captions, reconstruct
from .emoji_evaluation import TASKS, TEMPERATURE, Case, ask, exam_cases, exam_scenes
from .figures import draw_sample_sheet
from .world.concepts import drawn_concepts, load_subjects
from .world.icons import UNSEEN_VENDOR
from .world.scenes import Scene, World

NAMED, ANSWERED, DRAWN, RECONSTRUCTED = "samples.png", "answers.png", "drawn.png", "reconstructions.png"
PICTURES = (NAMED, ANSWERED, DRAWN, RECONSTRUCTED)
"""The files, in the folder of the repository."""

NUM_SINGLES, NUM_GRIDS = 12, 6
ASKED_OF_GRIDS = ("caption", "count", "cell_any", "place", "exists")


def draw_pictures(model: str | Path, icons: str | Path, folder: str | Path, temperature: float = TEMPERATURE) -> None:
    """
    Draws all [`PICTURES`], of drawings of the unseen vendor; the first of the images that the evaluation shows.

    Args:
        model (`str` or `Path`): folder or Hub repo of a Libra.
        icons (`str` or `Path`): folder with the iconify JSON files.
        folder (`str` or `Path`): where to.
        temperature (`float`, *optional*, defaults to 0.2): of what it draws.
    """
    icons = Path(icons)
    concepts = drawn_concepts(icons, (UNSEEN_VENDOR,))
    libra = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    num_singles = len(concepts)
    scenes = exam_scenes(World(load_subjects(concepts, (UNSEEN_VENDOR,), icons), "test", num_singles * 5 // 2))
    chosen = scenes[:num_singles][:: max(1, num_singles // NUM_SINGLES)][:NUM_SINGLES]
    grids = [scene for scene in scenes if not scene.is_single][:NUM_GRIDS]

    named = exam_cases(chosen, concepts, {"label": TASKS["label"]})
    answers = ask(libra, processor, chosen, named, len(named))
    draw_sample_sheet(
        [scene.image for scene in chosen], [_said(*pair) for pair in zip(named, answers)], Path(folder, NAMED)
    )

    cases = exam_cases(grids, concepts, {name: TASKS[name] for name in ASKED_OF_GRIDS})
    texts = _answered(grids, cases, ask(libra, processor, grids, cases, len(cases)))
    draw_sample_sheet([scene.image for scene in grids], texts, Path(folder, ANSWERED), columns=3, side=220)

    captions = [scene.caption for scene in (*chosen[:6], *grids)]
    drawn = draw_captions(libra, processor, captions, temperature)
    draw_sample_sheet(drawn, captions, Path(folder, DRAWN))
    _draw_reconstructions(processor, [scene.image for scene in (*chosen[:3], *grids[:3])], Path(folder, RECONSTRUCTED))


def _said(case: Case, answer: str) -> str:
    """The answer, and the right one in brackets where it is another."""
    right = case.question.answer
    return answer if answer == right else f"{answer or '-'} ({right})"


def _answered(scenes: Sequence[Scene], cases: Sequence[Case], answers: Sequence[str]) -> list[str]:
    """Questions without their prompts and answers, a line each, for every scene."""
    lines: list[list[str]] = [[] for _ in scenes]
    for case, answer in zip(cases, answers):
        asked = "Caption:" if case.question.kind == "caption" else case.question.question.split("\n")[0]
        lines[case.image].append(f"{asked} {_said(case, answer)}")
    return ["\n".join(of_scene) for of_scene in lines]


def _draw_reconstructions(processor: Any, images: Sequence[Image.Image], path: Path) -> None:
    """Images in a row above their reconstructions."""
    found, decibels, _ = reconstruct(processor, images)
    texts = ["input"] * len(images) + [f"{value:.1f} dB" for value in decibels]
    draw_sample_sheet([*images, *found], texts, path, columns=len(images))
