"""The ablations of the paper's Table 3 at tiny size: every variant with three seeds, and what it does to naming things.

    python -m training.ablations                                    # or: make ablations
    python -m training.ablations --variants full no-bridge --seeds 0 1

Each variant is the full model with one thing changed (see [`VARIANTS`]); all have the same frozen language model, the same
image tokenizer (but row (g)), and the same budget, that of `training/configs/ablations/`. Each run is one of the usual
stages in a process and a folder of its own in `runs/ablations`, with the configuration it was started with, and is
measured when it is done. What is done is not repeated, what was interrupted goes on from its last checkpoint; delete a
folder to run it anew. The table is written again after every run.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CLIPVisionModel

from libra_cli.caption import caption_images
from libra_cli.init import load_image_tokenizer
from libra_cli.loading import TINY_MODEL, load_libra

from .ablation_report import Row, write_report
from .pretrain import PretrainCollator
from .run import describe_duration
from .world.concepts import drawn_concepts, load_subjects
from .world.icons import UNSEEN_VENDOR, install_icons, present_vendors
from .world.scenes import Scene, World, evaluation_images

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "training" / "configs" / "ablations"
LAYOUTS = 5
"""Images of each concept that a model names."""


@dataclass(frozen=True)
class Variant:
    """
    The full model with one thing changed.

    Args:
        name (`str`): name of the variant and, with its seed, of the folder of a run.
        title (`str`): what it is, with its row of Table 3.
        changes (`dict`, *optional*): settings of pretraining that differ from the full model's.
        data_fraction (`float`, *optional*, defaults to 1.0): share of the full model's scenes, for as many steps.
        fresh_encoder (`bool`, *optional*, defaults to `False`):
            Whether its image tokenizer is trained with a fresh encoder, one for each seed.
        predicts_same_codes (`bool`, *optional*, defaults to `True`):
            Whether its loss over images means the same as the full model's.
    """

    name: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    data_fraction: float = 1.0
    fresh_encoder: bool = False
    predicts_same_codes: bool = True


VARIANTS = (
    Variant("full", "full model"),
    Variant(
        "language-supervision",
        "(a) language supervision only",
        {"vision_supervision": "none"},
        predicts_same_codes=False,
    ),
    Variant(
        "contiguous-supervision",
        "(b) contiguous supervision",
        {"vision_supervision": "features"},
        predicts_same_codes=False,
    ),
    Variant("less-data", "(c) a tenth of the data, seen ten times", data_fraction=0.1),
    Variant("no-expert", "(d) no expert", {"vision_system": {"use_expert": False}}),
    Variant("no-bridge", "(e) no bridge", {"vision_system": {"use_bridge": False}}),
    Variant("discrete-input", "(f) discrete input only", {"vision_system": {"use_continuous_features": False}}),
    Variant("fresh-encoder", "(g) encoder trained from scratch", fresh_encoder=True, predicts_same_codes=False),
)
"""The first is what the others are compared with."""


@dataclass(frozen=True)
class Step:
    """
    One run of a stage.

    Args:
        folder (`Path`): its output folder.
        module (`str`): the stage, as in `python -m MODULE`.
        settings (`dict`): its configuration, without `output_dir`.
        result (`str`): the file in the folder that is written last.
        variant ([`Variant`], *optional*): of a run that is measured.
    """

    folder: Path
    module: str
    settings: dict[str, Any]
    result: str
    variant: Variant | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.folder / self.result).is_file()


def plan(root: Path, configs: Path, variants: list[Variant], seeds: list[int], icons: Path) -> list[Step]:
    """
    All runs, those of one seed after the other.

    Args:
        root (`Path`): folder of all runs.
        configs (`Path`): folder with `llm.yaml`, `image_tokenizer.yaml` and `pretrain.yaml`.
        variants (`list` of [`Variant`]): what is trained.
        seeds (`list[int]`): of each variant.
        icons (`Path`): folder with iconify JSON files.

    Returns:
        `list` of [`Step`]: the shared parts first.
    """
    llm, tokenizer, pretrain = (
        yaml.safe_load((configs / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("llm", "image_tokenizer", "pretrain")
    )
    tokenizer |= {"clip": str(root / "clip"), "icons": str(icons)}
    steps = [Step(root / "llm", "training.train_llm", llm, "metrics.json")]

    def tokenizer_step(name: str, **changes: Any) -> Step:
        return Step(root / name, "training.train_image_tokenizer", tokenizer | changes, "metrics.json")

    if not all(variant.fresh_encoder for variant in variants):
        steps.append(tokenizer_step("tokenizer", seed=0))
    for seed in seeds:
        for variant in variants:
            trained = root / "tokenizer"
            if variant.fresh_encoder:
                steps.append(tokenizer_step(f"tokenizer-fresh-seed{seed}", encoder_from_scratch=True, seed=seed))
                trained = steps[-1].folder
            parts = {"language_model": str(root / "llm"), "image_tokenizer": str(trained), "icons": str(icons)}
            samples = round(pretrain["train_samples"] * variant.data_fraction)
            settings = pretrain | parts | {"train_samples": samples, "seed": seed} | variant.changes
            folder = root / f"{variant.name}-seed{seed}"
            steps.append(Step(folder, "training.pretrain", settings, "evaluation.json", variant))
    return steps


def export_clip(folder: Path) -> None:
    """
    Writes the CLIP of libra-tiny as a repository of its own, unless it is there.

    Args:
        folder (`Path`): where to.
    """
    if folder.is_dir():
        return
    clip: CLIPVisionModel = load_image_tokenizer(TINY_MODEL)[1].clip
    partial = folder.with_name(f"{folder.name}.partial")  # renamed when whole: a run may be killed at any moment
    clip.save_pretrained(partial)
    partial.rename(folder)


def run_stage(module: str, config: Path) -> None:
    """
    Runs a stage in a process of its own.

    Args:
        module (`str`): the stage.
        config (`Path`): its YAML file.

    Raises:
        SystemExit: if it fails, with its exit code.
    """
    code = subprocess.run([sys.executable, "-m", module, "--config", str(config)], cwd=ROOT).returncode
    if code:
        raise SystemExit(
            f"{config.parent.name} failed with exit code {code}; run the same command again to go on from there."
        )


def run_step(step: Step, icons: Path) -> None:
    """
    Trains what is left to train of a step, and measures it if it is a variant.

    Args:
        step ([`Step`]): what to run.
        icons (`Path`): folder with iconify JSON files.

    Raises:
        SystemExit: if the folder was started with another configuration, or the stage fails.
    """
    config = step.folder / "config.yaml"
    settings = step.settings | {"output_dir": str(step.folder)}
    if config.is_file() and yaml.safe_load(config.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{step.folder} was started with other settings (see {config}). Delete it, or use --output.")
    step.folder.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    run_stage(step.module, config)  # one that has all its steps loads its last checkpoint and is done
    if step.variant is not None:
        results = evaluate(step.folder, icons, step.settings["num_concepts"])
        partial = step.folder / "evaluation.json.partial"  # renamed when whole: a run may be killed at any moment
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(step.folder / step.result)
        print(", ".join(f"{name} {value:.3f}" for name, value in results.items()), flush=True)


def evaluate(folder: Path, icons: Path, num_concepts: int) -> dict[str, float]:
    """
    What a pretrained model makes of singles: new layouts of the training vendors, and the unseen vendor.

    Args:
        folder (`Path`): the model.
        icons (`Path`): folder with iconify JSON files.
        num_concepts (`int`): the concepts it knows.

    Returns:
        `dict`: `train_vendors` and `unseen_vendor`, the share of objects named right (the caption, greedily written, is
        exactly the label); `chance`; `text_loss` and `vision_loss` on the former images, in nats a token.
    """
    vendors = present_vendors(icons)
    concepts = drawn_concepts(icons, vendors)[:num_concepts]
    scenes = {
        "train_vendors": singles(World(load_subjects(concepts, vendors, icons), "validation", 1)),
        "unseen_vendor": singles(World(load_subjects(concepts, (UNSEEN_VENDOR,), icons), "test", 1)),
    }
    results = {name: naming_accuracy(folder, images) for name, images in scenes.items()}
    return results | {"chance": 1 / len(concepts)} | losses(folder, scenes["train_vendors"])


def singles(world: World) -> list[Scene]:
    """[`LAYOUTS`] images of each concept of a world."""
    return evaluation_images(world, LAYOUTS * len(world.subjects))


def naming_accuracy(folder: Path, scenes: list[Scene]) -> float:
    """
    How often a model captions an image with its label.

    Args:
        folder (`Path`): the model.
        scenes (`list` of [`Scene`]): the images.

    Returns:
        `float`: in [0, 1].
    """
    answers = caption_images([scene.image for scene in scenes], folder, max_new_tokens=16, batch_size=50)
    return sum(answer == scene.caption for answer, scene in zip(answers, scenes)) / len(scenes)


@torch.no_grad()
def losses(folder: Path, scenes: list[Scene]) -> dict[str, float]:
    """
    The losses of pretraining on whole scenes, codes and captions, whatever the model was trained on.

    Args:
        folder (`Path`): the model.
        scenes (`list` of [`Scene`]): the images.

    Returns:
        `dict` with `text_loss` and `vision_loss`.
    """
    model, processor = load_libra(folder)
    batch = PretrainCollator(processor)([{"image": scene.image, "text": scene.caption} for scene in scenes])
    batch.pop("draws")
    outputs = model(**processor.tokenize_images(batch), use_cache=False)
    return {name: outputs[name].item() for name in ("text_loss", "vision_loss")}


def read_rows(steps: list[Step]) -> list[Row]:
    """
    What has been measured so far.

    Args:
        steps (`list` of [`Step`]): all runs.

    Returns:
        `list` of [`Row`]: one for each variant that has been measured with a seed at least.
    """
    rows = []
    for variant in VARIANTS:
        done = [step.folder for step in steps if step.variant is variant and step.is_done]
        numbers = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in done]
        if numbers:
            rows.append(Row(variant.title, numbers, variant.predicts_same_codes))
    return rows


def describe_budget(steps: list[Step]) -> str:
    """
    How the variants were trained.

    Args:
        steps (`list` of [`Step`]): all runs.

    Returns:
        `str`: a paragraph.
    """
    llm = steps[0].settings
    run = next(step.settings for step in steps if step.variant is not None)
    tokenizer = next(step.settings for step in steps if step.module.endswith("image_tokenizer"))
    sizes = llm["model_config"]
    return (
        f"Language model: {sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}, {llm['max_steps']} steps on "
        f"text alone, frozen. Image tokenizer: around the CLIP of libra-tiny, {tokenizer['max_steps']} steps of "
        f"{tokenizer['per_device_train_batch_size']} images; a fresh encoder gets the same. Pretraining: "
        f"{run['max_steps']} steps of {run['per_device_train_batch_size']} scenes of {run['num_concepts']} concepts."
    )


def update_report(path: Path, steps: list[Step]) -> None:
    """
    Writes the table of what has been measured so far, if there is something.

    Args:
        path (`Path`): the Markdown file.
        steps (`list` of [`Step`]): all runs.
    """
    rows = read_rows(steps)
    if rows:
        write_report(path, rows, describe_budget(steps))


def main(arguments: list[str] | None = None) -> None:
    """
    Runs what is not done yet, and writes the table.

    Args:
        arguments (`list` of `str`, *optional*): command line; by default that of the process.

    Raises:
        SystemExit: if a stage fails, or a folder has other settings.
    """
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(description="Trains and compares the ablations of the paper's Table 3.")
    parser.add_argument("--variants", nargs="+", choices=names, default=names, help="what to train (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each variant")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "ablations", help="folder of the runs")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder with the configurations of the stages")
    parser.add_argument("--icons", type=Path, help="folder with iconify JSON files (default: installed with npm)")
    parser.add_argument("--report", type=Path, help="file for the table (default: ABLATIONS.md beside the runs)")
    options = parser.parse_args(arguments)
    root = options.output.resolve()
    icons = (options.icons or install_icons()).resolve()
    variants = [variant for variant in VARIANTS if variant.name in options.variants]
    steps = plan(root, options.configs, variants, options.seeds, icons)
    left = [step for step in steps if not step.is_done]
    print(f"{len(steps) - len(left)} of {len(steps)} runs are done.", flush=True)
    report = options.report or root / "ABLATIONS.md"
    update_report(report, steps)
    export_clip(root / "clip")
    start = time.monotonic()
    for number, step in enumerate(left, start=1):
        print(f"[{number}/{len(left)}] {step.folder.name}: python -m {step.module}", flush=True)
        run_step(step, icons)
        update_report(report, steps)
        remaining = (time.monotonic() - start) / number * (len(left) - number)
        end = datetime.now() + timedelta(seconds=remaining)
        print(f"{step.folder.name} is done | all end {end:%a %H:%M}, in {describe_duration(remaining)}", flush=True)
    print(f"The table is in {report}.", flush=True)


if __name__ == "__main__":
    main()
