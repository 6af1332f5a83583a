"""How often libra-tiny names the one object of an image: training vendors, unseen vendor, chance.

    python -m training.evaluate_tiny --model hub_configs/libra-tiny
    python -m training.evaluate_tiny --model DIR --write-card --runs runs/tiny/pretrain runs/tiny/sft

The model is used as its users use it: `pipeline("image-to-text")` with remote code, on new layouts, one image of each of
the 100 concepts. An answer counts when it is exactly the label. The card gets the numbers, the loss curves of the runs
and a sheet of named drawings.
"""

import argparse
import json
from pathlib import Path

from PIL import Image
from transformers import pipeline

from .card import LOSS_CURVES, SAMPLES, write_card
from .figures import draw_loss_curves, draw_sample_sheet
from .world.concepts import load_concepts, load_subjects
from .world.icons import TRAIN_VENDORS, UNSEEN_VENDOR, install_icons
from .world.scenes import World, evaluation_images


def name_images(model: str | Path, images: list[Image.Image], batch_size: int = 20) -> list[str]:
    """
    Captions of images by the image-to-text pipeline.

    Args:
        model (`str` or `Path`): folder or Hub repo of a Libra.
        images (`list` of `PIL.Image.Image`): the images.
        batch_size (`int`, *optional*, defaults to 20): images a batch.

    Returns:
        `list` of `str`: a caption an image.
    """
    captioner = pipeline("image-to-text", model=str(model), trust_remote_code=True)
    outputs = captioner(images, batch_size=batch_size, generate_kwargs={"max_new_tokens": 16})
    return [output[0]["generated_text"].strip() for output in outputs]


def evaluate_singles(model: str | Path, icons: Path) -> dict[str, float]:
    """
    Accuracy on singles, one image of each concept: new layouts of the training vendors, and the unseen vendor.

    Args:
        model (`str` or `Path`): folder or Hub repo of a Libra.
        icons (`Path`): folder with the iconify JSON files.

    Returns:
        `dict` with `train_vendors`, `unseen_vendor` and `chance`, each in [0, 1].
    """
    concepts = load_concepts()
    results = {}
    splits = {"train_vendors": (TRAIN_VENDORS, "validation"), "unseen_vendor": ((UNSEEN_VENDOR,), "test")}
    for name, (vendors, split) in splits.items():
        world = World(load_subjects(concepts, vendors, icons), split=split, length=len(concepts))
        scenes = evaluation_images(world, len(concepts))
        answers = name_images(model, [scene.image for scene in scenes])
        results[name] = sum(answer == scene.caption for answer, scene in zip(answers, scenes)) / len(scenes)
    return results | {"chance": 1 / len(concepts)}


def draw_named_samples(model: str | Path, icons: Path, path: Path, count: int = 12) -> None:
    """
    Draws singles of the unseen vendor with the names the model gives them, and the right name where it is another.

    Args:
        model (`str` or `Path`): folder or Hub repo of a Libra.
        icons (`Path`): folder with the iconify JSON files.
        path (`Path`): the PNG file to write.
        count (`int`, *optional*, defaults to 12): drawings, of concepts at equal distances in their list.
    """
    subjects = load_subjects(load_concepts(), (UNSEEN_VENDOR,), icons)
    chosen = subjects[:: max(1, len(subjects) // count)][:count]
    images = [scene.image for scene in evaluation_images(World(chosen, "test", len(chosen)), len(chosen))]
    answers = name_images(model, images)
    captions = [
        answer if answer == subject.label else f"{answer} ({subject.label})" for answer, subject in zip(answers, chosen)
    ]
    draw_sample_sheet(images, captions, path)


def main(arguments: list[str] | None = None) -> None:
    """Evaluates and prints the three numbers; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(description="Names single objects with a Libra.")
    parser.add_argument("--model", default="hub_configs/libra-tiny", help="folder or Hub repo")
    parser.add_argument("--icons", help="folder with iconify JSON files (default: installed with npm)")
    parser.add_argument("--output", help="JSON file to write the numbers to")
    parser.add_argument("--write-card", action="store_true", help="write the numbers into the model's card")
    parser.add_argument("--runs", nargs="+", metavar="RUN_DIR", help="stages whose loss curves go into the card")
    options = parser.parse_args(arguments)
    curves = Path(options.model, LOSS_CURVES)
    if options.runs:
        draw_loss_curves(options.runs, curves)
    elif options.write_card and not curves.is_file():
        parser.error(f"the card shows {curves}, which is not there; pass --runs with the folders of the stages")
    icons = Path(options.icons) if options.icons else install_icons()
    results = evaluate_singles(options.model, icons)
    for name, value in results.items():
        print(f"{name:>14}: {value:.0%} of {len(load_concepts())} single objects named right")
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.write_card:
        draw_named_samples(options.model, icons, Path(options.model, SAMPLES))
        write_card(options.model, results)


if __name__ == "__main__":
    main()
