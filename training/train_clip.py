"""
Stage 0: a small CLIP, trained contrastively. (At full size OpenAI's CLIP-ViT-L/14-336 is used instead.)

    python -m training.train_clip --config training/configs/tiny/clip.yaml
    python -m training.train_clip --config training/configs/tiny/clip.yaml --max_steps 10 --output_dir runs/try
    python -m training.train_clip --config my.yaml --dataset path/to/imagefolder
    python -m training.train_clip --config my.yaml --start_from hub_configs/libra-tiny/image_tokenizer

A run goes on from the last checkpoint in `output_dir` by itself. Written there: the whole CLIPModel with the tokenizer
of its text tower, the vision tower alone with its image processor in `vision/` (what the image tokenizer reads), and
`metrics.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from processing.modeling_libra_image_tokenizer import LibraImageTokenizer

from .clip_evaluation import libra_features, probe_accuracy, zero_shot_accuracy
from .clip_objective import NOTHING, ClipCollator, ClipObjective, train_text_tokenizer
from .images import CLIP_MEAN, CLIP_STD, CaptionedFolder, to_pixel_values
from .loss_terms import LossTermsTrainer
from .run import StageParser, announce_run, run_training
from .teacher import TEACHER_WIDTH, load_features
from .world.augment import Augmentation
from .world.concepts import load_concepts, load_other_subjects, load_subjects, training_subjects
from .world.icons import UNSEEN_VENDOR, install_icons
from .world.scenes import World, evaluation_images


@dataclass
class ClipArguments:
    """
    What is trained, on what.

    Args:
        dataset (`str`, *optional*, defaults to `"world"`): `"world"`, or a folder of images with captions.
        icons (`str`, *optional*): Folder with iconify JSON files; by default they are installed with npm.
        vision_config (`dict`, *optional*): Settings of `CLIPVisionConfig`.
        text_config (`dict`, *optional*): Settings of `CLIPTextConfig`; `vocab_size` is the most tokens there may be.
        projection_dim (`int`, *optional*, defaults to 128): Width of the space shared by images and texts.
        select_layers (`list[int]`, *optional*, defaults to `[2, 4, 6, 8]`): Layers Libra reads, for the probe.
        concept_fraction (`float`, *optional*, defaults to 0.97): Share of objects that are concepts; the others are
            further emoji. 1 leaves the further emoji out.
        single_fraction (`list[float]`, *optional*, defaults to `[0.5, 0.85]`): Share of singles at the beginning and
            the end of training.
        augmentation (`dict`, *optional*): Settings of [`Augmentation`].
        teacher_size (`int`, *optional*, defaults to 128): Side at which the teacher looks at drawings; 0: no teacher.
        teacher_weight (`float`, *optional*, defaults to 3.0): Weight of the teacher's term.
        start_from (`str`, *optional*): Image tokenizer whose CLIP is trained further; by default it starts fresh. The
            text tower always does.
    """

    dataset: str = field(default="world", metadata={"help": "'world', or a folder of images with captions."})
    icons: str | None = field(default=None, metadata={"help": "Folder with iconify JSON files (default: npm)."})
    vision_config: dict = field(default_factory=dict, metadata={"help": "Settings of CLIPVisionConfig."})
    text_config: dict = field(default_factory=dict, metadata={"help": "Settings of CLIPTextConfig."})
    projection_dim: int = field(default=128, metadata={"help": "Width of the shared space."})
    select_layers: list[int] = field(default_factory=lambda: [2, 4, 6, 8], metadata={"help": "Layers Libra reads."})
    concept_fraction: float = field(default=0.97, metadata={"help": "Share of objects that are concepts."})
    single_fraction: list[float] = field(
        default_factory=lambda: [0.5, 0.85], metadata={"help": "Share of singles at the beginning and the end."}
    )
    augmentation: dict = field(default_factory=dict, metadata={"help": "Settings of Augmentation."})
    teacher_size: int = field(default=128, metadata={"help": "Side at which the teacher looks; 0: no teacher."})
    teacher_weight: float = field(default=3.0, metadata={"help": "Weight of the teacher's term."})
    start_from: str | None = field(default=None, metadata={"help": "Image tokenizer whose CLIP is trained further."})


class WorldSamples(torch.utils.data.Dataset):
    """
    Scenes as samples for [`ClipCollator`].

    Args:
        world ([`World`]): The scenes.
        image_size (`int`): Side of the images CLIP reads.
    """

    def __init__(self, world: World, image_size: int) -> None:
        self.world = world
        self.image_size = image_size
        counts = [len(subject.drawings) for subject in world.subjects]
        self.first_drawing = np.concatenate([[0], np.cumsum(counts)])  # drawings of all subjects in one row

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> dict:
        """Sample `index`: `pixel_values` `(3, size, size)`, `caption`, `regions` and `drawings`."""
        scene = self.world[index]
        regions: list[str | None] = [None] * 5 if scene.is_single else [None, *[NOTHING] * 4]
        drawings = [-1] * 5
        for item in scene.objects:
            region = 0 if item.cell is None else item.cell + 1
            regions[region] = self.world.subjects[item.subject].label
            drawings[region] = int(self.first_drawing[item.subject]) + item.drawing
        pixels = to_pixel_values(scene.image, self.image_size)
        return {"pixel_values": pixels, "caption": scene.caption, "regions": regions, "drawings": drawings}


class FolderSamples(torch.utils.data.Dataset):
    """
    Captioned images as samples for [`ClipCollator`]: the caption names the whole image.

    Args:
        folder ([`CaptionedFolder`]): The images.
        image_size (`int`): Side of the images CLIP reads.
    """

    def __init__(self, folder: CaptionedFolder, image_size: int) -> None:
        self.folder = folder
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> dict:
        """Sample `index`: `pixel_values` `(3, size, size)`, `caption` and `regions`."""
        image, caption = self.folder[index]
        pixels = to_pixel_values(image, self.image_size)
        return {"pixel_values": pixels, "caption": caption, "regions": [caption, None, None, None, None]}


class ClipTrainer(LossTermsTrainer):
    """A Trainer that also logs the terms of the loss, and the scale of the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch; its terms are kept for the next log."""
        outputs = model(**inputs)
        self.keep_terms({name: value for name, value in outputs.items() if name != "loss"})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms of the loss and the scale of the logits."""
        if "loss" in logs:
            logs["logit_scale"] = round(self.model.clip.logit_scale.detach().exp().item(), 2)
        super().log(logs, start_time)


@dataclass
class ClipData:
    """
    What a run trains on.

    Args:
        samples (`Dataset`): Samples for [`ClipCollator`].
        texts (`list[str]`): What the tokenizer of the text tower is trained on.
        candidates (`list[str]`): Names every region is contrasted with.
        drawings (`list[np.ndarray]`): What the teacher looks at, in the order samples refer to; empty: no teacher.
    """

    samples: torch.utils.data.Dataset
    texts: list[str]
    candidates: list[str] = field(default_factory=list)
    drawings: list[np.ndarray] = field(default_factory=list)


def load_world_data(script: ClipArguments, args: TrainingArguments, source: Path) -> ClipData:
    """Scenes of the concepts and, for a part, of further emoji: singles and grids, with augmentation."""
    subjects = training_subjects(source)
    concepts = load_concepts(len(subjects))
    if script.concept_fraction < 1:
        subjects += load_other_subjects(concepts, source)
    start, end = script.single_fraction
    world = World(
        subjects,
        split="train",
        length=args.max_steps * args.train_batch_size * args.gradient_accumulation_steps,
        seed=args.data_seed or args.seed,
        single_fraction=(start, end),
        max_objects=4,
        augmentation=Augmentation(**script.augmentation),
        weights=subject_weights(len(concepts), len(subjects), script.concept_fraction),
    )
    names = [subject.label for subject in subjects]
    return ClipData(
        samples=WorldSamples(world, script.vision_config["image_size"]),
        texts=[*names, NOTHING, "to the left of", "above", "and"],
        candidates=[*names[: len(concepts)], NOTHING],
        drawings=[drawing for subject in subjects for drawing in subject.drawings],
    )


def subject_weights(num_concepts: int, num_subjects: int, concept_fraction: float) -> np.ndarray:
    """Probability of each subject, `(num_subjects,)`, when the first `num_concepts` share `concept_fraction`."""
    weights = np.ones(num_subjects)
    weights[:num_concepts] = concept_fraction / num_concepts
    if num_subjects > num_concepts:
        weights[num_concepts:] = (1 - concept_fraction) / (num_subjects - num_concepts)
    return weights


def load_folder_data(script: ClipArguments) -> ClipData:
    """A folder of captioned images."""
    folder = CaptionedFolder(script.dataset)
    samples = FolderSamples(folder, script.vision_config["image_size"])
    return ClipData(samples, texts=list(folder.rows[folder.caption_column]))


def teacher_features(drawings: list[np.ndarray], image_size: int) -> torch.Tensor | None:
    """What the teacher sees in each drawing, centered and of length one, `(drawings, 1280)`; `None` without drawings."""
    if not image_size or not drawings:
        return None
    features = torch.from_numpy(load_features(drawings, image_size))
    return torch.nn.functional.normalize(features - features.mean(dim=0), dim=-1)


def build_model(script: ClipArguments, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """
    A CLIPModel with fresh weights, or with the vision tower to start from; its text tower fits the tokenizer.

    Raises:
        RuntimeError: If the vision tower to start from has other sizes.
    """
    text_config = {
        **script.text_config,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        text_config=text_config, vision_config=script.vision_config, projection_dim=script.projection_dim
    )
    # Eager: the backward pass of fused attention in bfloat16 takes most of a step at this size on CPUs.
    model = AutoModel.from_config(config, attn_implementation="eager")
    if script.start_from is not None:
        model.vision_model.load_state_dict(LibraImageTokenizer.from_pretrained(script.start_from).clip.state_dict())
    return model


@torch.inference_mode()
def measure(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, script: ClipArguments, source: Path) -> dict:
    """
    Zero-shot and probe accuracy on singles of the concepts: new layouts of training vendors, and the unseen vendor.

    Args:
        model (`CLIPModel`): The trained model.
        tokenizer (`PreTrainedTokenizerFast`): Tokenizer of its text tower.
        script ([`ClipArguments`]): For the layers Libra reads.
        source (`Path`): Folder with the iconify JSON files.

    Returns:
        `dict[str, float]`: Accuracies in [0, 1], and chance.
    """
    model.eval()
    size = model.config.vision_config.image_size
    known = training_subjects(source)
    concepts = load_concepts(len(known))
    unseen = load_subjects(concepts, (UNSEEN_VENDOR,), source)
    sets = {}
    for name, subjects, split, count in (
        ("probe", known, "train", 20 * len(concepts)),
        ("train_vendors", known, "validation", 5 * len(concepts)),
        ("unseen_vendor", unseen, "test", len(concepts)),
    ):
        scenes = evaluation_images(World(subjects, split, count), count)
        pixels = torch.stack([to_pixel_values(scene.image, size) for scene in scenes])
        sets[name] = pixels, torch.tensor([scene.objects[0].subject for scene in scenes])
    features = {
        name: libra_features(model.vision_model, pixels, script.select_layers) for name, (pixels, _) in sets.items()
    }
    tested = ("train_vendors", "unseen_vendor")
    probe = probe_accuracy(
        (features["probe"], sets["probe"][1]), [(features[name], sets[name][1]) for name in tested], len(concepts)
    )
    labels = [concept.label for concept in concepts]
    metrics = {f"probe_{name}": accuracy for name, accuracy in zip(tested, probe)}
    for name in tested:
        metrics[f"zero_shot_{name}"] = zero_shot_accuracy(model, tokenizer, *sets[name], labels)
    return {name: round(value, 4) for name, value in metrics.items()} | {"chance": 1 / len(concepts)}


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the whole model, and the vision tower with its image processor in `vision/`."""
    size = model.config.vision_config.image_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.vision_model.save_pretrained(folder / "vision")
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=CLIP_MEAN.tolist(),
        image_std=CLIP_STD.tolist(),
    )
    image_processor.save_pretrained(folder)
    image_processor.save_pretrained(folder / "vision")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """
    Train, save and measure.

    Args:
        arguments (`list[str]`, *optional*): Command line; by default that of the process.

    Returns:
        `dict[str, float]`: The metrics, empty for a dataset other than the world.

    Raises:
        ValueError: If the configuration does not say how large the images are, or how many scenes to draw.
    """
    script, args = StageParser("clip", (ClipArguments, TrainingArguments)).parse_args_and_config(arguments)
    if "image_size" not in script.vision_config:
        raise ValueError("vision_config has no image_size. Set it, for instance to 96.")
    if script.dataset == "world" and args.max_steps < 1:
        raise ValueError("The world has as many scenes as the run needs: set max_steps, for instance to 3200.")
    announce_run(args, "clip")
    set_seed(args.seed)
    source = Path(script.icons) if script.icons else None
    if script.dataset == "world":
        source = source or install_icons()
        data = load_world_data(script, args, source)
    else:
        data = load_folder_data(script)
    tokenizer = train_text_tokenizer(
        data.texts,
        vocab_size=script.text_config.get("vocab_size", 2048),
        max_length=script.text_config.get("max_position_embeddings", 32),
    )
    teacher = teacher_features(data.drawings, script.teacher_size)
    objective = ClipObjective(
        build_model(script, tokenizer),
        teacher_width=None if teacher is None else TEACHER_WIDTH,
        teacher_weight=script.teacher_weight,
    )
    print(f"CLIP vision tower: {objective.clip.vision_model.num_parameters():,} parameters", flush=True)
    trainer = ClipTrainer(
        model=objective,
        args=args,
        train_dataset=data.samples,
        data_collator=ClipCollator(tokenizer, data.candidates, teacher),
    )
    run_training(trainer)
    save(objective.clip, tokenizer, Path(args.output_dir))
    if script.dataset != "world" or source is None:
        return {}
    metrics = measure(objective.clip, tokenizer, script, source)
    Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2), flush=True)
    return metrics


if __name__ == "__main__":
    main()
