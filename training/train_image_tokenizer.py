"""
Stage 0: the image tokenizer (Section 3.1): quantizer and decoder around a frozen CLIP.

    python -m training.train_image_tokenizer --config training/configs/tiny/image_tokenizer.yaml
    python -m training.train_image_tokenizer --config my.yaml --dataset path/to/imagefolder --clip openai/clip-vit-large-patch14-336

A run goes on from the last checkpoint in `output_dir` by itself. Written there: the image tokenizer, its image
processor, and `metrics.json` (PSNR, and how much of each codebook is in use).
"""

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import EvalPrediction, set_seed

from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer

from .images import CLIP_MEAN, CLIP_STD, CaptionedFolder, to_pixel_values
from .loss_terms import LossTermsTrainer
from .run import StageParser, announce_run, run_training
from .world.augment import Augmentation
from .world.concepts import load_concepts, load_other_subjects, training_subjects
from .world.icons import install_icons
from .world.scenes import Scene, World


@dataclass
class ImageTokenizerArguments:
    """
    What is trained, on what.

    Args:
        clip (`str`): Folder or Hub repo of the CLIP vision tower; it stays frozen.
        dataset (`str`, *optional*, defaults to `"world"`): `"world"`, or a folder of images with captions.
        icons (`str`, *optional*): Folder with iconify JSON files; by default they are installed with npm.
        tokenizer_config (`dict`, *optional*): Settings of `LibraImageTokenizerConfig`.
        codes_of (`str`, *optional*): Folder of a trained image tokenizer with the same CLIP whose codes are kept: only a
            new decoder is trained, and models that were trained on these codes stay valid.
        other_emoji (`bool`, *optional*, defaults to `True`): Whether scenes show further emoji beside the concepts.
        augmentation (`dict`, *optional*): Settings of [`~training.world.augment.Augmentation`].
        train_samples (`int`, *optional*, defaults to 100000): Scenes of the world in an epoch.
        eval_samples (`int`, *optional*, defaults to 200): Scenes of the validation split.
        l1_weight (`float`, *optional*, defaults to 1.0): Weight of the absolute error of pixels in [-1, 1].
        mse_weight (`float`, *optional*, defaults to 1.0): Weight of their squared error.
        perceptual_weight (`float`, *optional*, defaults to 0.1): Weight of the distance of frozen CLIP features.
        perceptual_layer (`int`, *optional*, defaults to 2): Hidden state of CLIP in which that distance is taken.

    Raises:
        ValueError: If there are to be no training samples.
    """

    clip: str = field(metadata={"help": "Folder or Hub repo of the CLIP vision tower."})
    dataset: str = field(default="world", metadata={"help": "'world', or a folder of images with captions."})
    icons: str | None = field(default=None, metadata={"help": "Folder with iconify JSON files (default: npm)."})
    tokenizer_config: dict = field(default_factory=dict, metadata={"help": "Settings of LibraImageTokenizerConfig."})
    codes_of: str | None = field(default=None, metadata={"help": "Image tokenizer whose codes are kept."})
    other_emoji: bool = field(default=True, metadata={"help": "Whether scenes show further emoji."})
    augmentation: dict = field(default_factory=dict, metadata={"help": "Settings of Augmentation."})
    train_samples: int = field(default=100_000, metadata={"help": "Scenes of the world in an epoch."})
    eval_samples: int = field(default=200, metadata={"help": "Scenes of the validation split."})
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the absolute error."})
    mse_weight: float = field(default=1.0, metadata={"help": "Weight of the squared error."})
    perceptual_weight: float = field(default=0.1, metadata={"help": "Weight of the distance of CLIP features."})
    perceptual_layer: int = field(default=2, metadata={"help": "Hidden state in which that distance is taken."})

    def __post_init__(self):
        if self.train_samples < 1:
            raise ValueError(f"train_samples must be at least 1, found {self.train_samples}.")


class PixelSamples(Dataset):
    """
    Images alone, as CLIP sees them.

    Args:
        source ([`World`] or [`CaptionedFolder`]): Where the images come from.
        image_size (`int`): Side of the images.
    """

    def __init__(self, source: World | CaptionedFolder, image_size: int) -> None:
        self.source = source
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index`: `pixel_values` `(3, size, size)`."""
        sample = self.source[index]
        image: Image.Image = sample.image if isinstance(sample, Scene) else sample[0]
        return {"pixel_values": to_pixel_values(image, self.image_size)}


def clip_to_unit(pixel_values: Tensor) -> Tensor:
    """Pixels as CLIP reads them, `(n, 3, h, w)`, as the decoder writes them: -1 is black and 1 is white."""
    mean, std = (pixel_values.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixel_values * std + mean) * 2 - 1


def unit_to_clip(pixels: Tensor) -> Tensor:
    """The inverse of [`clip_to_unit`]."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """
    Peak signal-to-noise ratio of pixels in [-1, 1], in decibels.

    Args:
        reconstruction, target (`torch.Tensor` of shape `(n, 3, h, w)`): Compared after clamping.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    error = (reconstruction.clamp(-1, 1) - target).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def codebook_use(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """
    How much of each codebook is in use.

    Args:
        codes (`torch.Tensor` of shape `(..., num_codebooks)`): Codes of many patches.
        codebook_size (`int`): Entries per codebook.

    Returns:
        `dict[str, float]`: `usage_i`, the share of entries that occur, in [0, 1], and `perplexity_i`, in
        [1, codebook_size], for each codebook `i`.
    """
    found = {}
    for i, column in enumerate(codes.reshape(-1, codes.shape[-1]).T):
        share = torch.bincount(column, minlength=codebook_size).double() / len(column)  # (codebook_size,)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        found[f"usage_{i}"] = round(float((share > 0).double().mean()), 4)
        found[f"perplexity_{i}"] = round(float(entropy.exp()), 1)
    return found


class ImageTokenizerTrainer(LossTermsTrainer):
    """
    A Trainer for [`LibraImageTokenizer`]: adds the reconstruction terms to the loss of the quantizer, logs all terms.

    Args:
        script ([`ImageTokenizerArguments`]): For the weights of the terms.
        kwargs: As in transformers' `Trainer`.
    """

    def __init__(self, script: ImageTokenizerArguments, **kwargs) -> None:
        super().__init__(**kwargs)
        self.script = script
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its batch
        self.label_names = ["pixel_values"]  # images are their own targets in evaluation

    def reconstruction_terms(
        self, model: LibraImageTokenizer, reconstruction: Tensor, pixels: Tensor
    ) -> dict[str, Tensor]:
        """
        The distances between images and their reconstructions, unweighted.

        Args:
            model ([`LibraImageTokenizer`]): Its frozen CLIP gives the perceptual term.
            reconstruction (`torch.Tensor` of shape `(n, 3, h, w)`): In [-1, 1].
            pixels (`torch.Tensor` of shape `(n, 3, h, w)`): As CLIP reads them.
        """
        target = clip_to_unit(pixels)
        terms = {"l1": F.l1_loss(reconstruction, target), "mse": F.mse_loss(reconstruction, target)}
        if self.script.perceptual_weight:
            with torch.no_grad():
                wanted = early_features(model, pixels, self.script.perceptual_layer)
            found = early_features(model, unit_to_clip(reconstruction), self.script.perceptual_layer)
            terms["perceptual"] = F.mse_loss(found, wanted)
        return terms

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Reconstruction and quantizer loss of a batch; the terms are kept for the next log."""
        pixels = inputs["pixel_values"]
        outputs = model(pixel_values=pixels, return_losses=True)
        terms = self.reconstruction_terms(self.accelerator.unwrap_model(model), outputs.reconstruction, pixels)
        weights = {
            "l1": self.script.l1_weight,
            "mse": self.script.mse_weight,
            "perceptual": self.script.perceptual_weight,
        }
        loss = outputs.loss + torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        terms |= {name: outputs[name] for name in ("per_sample_entropy", "codebook_entropy", "commitment")}
        scores = psnr(outputs.reconstruction.detach(), clip_to_unit(pixels))  # (n,)
        terms["psnr"] = scores.mean()
        self.keep_terms(terms)
        return (loss, {"loss": loss, "psnr": scores, "codes": outputs.codes}) if return_outputs else loss


def early_features(model: LibraImageTokenizer, pixels: Tensor, layer: int) -> Tensor:
    """
    Hidden states of the frozen CLIP, with gradients to the pixels, running no deeper than needed.

    Args:
        model ([`LibraImageTokenizer`]): Whose CLIP is used.
        pixels (`torch.Tensor` of shape `(n, 3, h, w)`): As CLIP reads them.
        layer (`int`): Index of the hidden state, at least 1.

    Returns:
        `torch.Tensor` of shape `(n, patches, width)`.
    """
    hidden = next(islice(model.clip_hidden_states(pixels), layer, None))  # (n, 1 + patches, width)
    return F.layer_norm(hidden[:, 1:], hidden.shape[-1:])


def keep_codes(model: LibraImageTokenizer, folder: str) -> None:
    """
    Takes over the encoder and the quantizer of a trained image tokenizer and freezes them.

    Args:
        model ([`LibraImageTokenizer`]): Changed in place; its decoder stays as it is.
        folder (`str`): The trained image tokenizer.

    Raises:
        RuntimeError: If its sizes before the decoder are others.
    """
    trained = LibraImageTokenizer.from_pretrained(folder)
    for name in ("clip", "pre_quant", "quantizer"):
        part = getattr(model, name)
        part.load_state_dict(getattr(trained, name).state_dict())
        part.requires_grad_(False)


def load_images(script: ImageTokenizerArguments, image_size: int) -> tuple[Dataset, Dataset | None]:
    """
    Training and evaluation images; a folder of one's own has no evaluation part.

    Args:
        script ([`ImageTokenizerArguments`]): Where from.
        image_size (`int`): Side of the images.
    """
    if script.dataset != "world":
        return PixelSamples(CaptionedFolder(script.dataset), image_size), None
    source = Path(script.icons) if script.icons else install_icons()
    concepts = training_subjects(source)
    subjects = concepts + (load_other_subjects(load_concepts(len(concepts)), source) if script.other_emoji else [])
    augmentation = Augmentation(**script.augmentation) if script.augmentation else None
    train = World(subjects, "train", script.train_samples, augmentation=augmentation)
    return PixelSamples(train, image_size), PixelSamples(World(concepts, "validation", script.eval_samples), image_size)


def measure(prediction: EvalPrediction, codebook_size: int) -> dict[str, float]:
    """PSNR and the use of the codebooks over an evaluation set."""
    scores, codes = prediction.predictions
    return {"psnr": round(float(scores.mean()), 3), **codebook_use(torch.from_numpy(codes), codebook_size)}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """
    Train, save and measure.

    Args:
        arguments (`list[str]`, *optional*): Command line; by default that of the process.

    Returns:
        `dict[str, float]`: The metrics on new scenes of the training vendors, empty for a folder of one's own.
    """
    script, args = StageParser("tokenizer", (ImageTokenizerArguments, TrainingArguments)).parse_args_and_config(
        arguments
    )
    args.remove_unused_columns = False
    announce_run(args, "tokenizer")
    set_seed(args.seed)
    model = LibraImageTokenizer.from_clip(script.clip, **script.tokenizer_config)
    if script.codes_of:
        keep_codes(model, script.codes_of)
    size = model.config.vision_config.image_size
    train, validation = load_images(script, size)
    print(f"Decoder: {sum(p.numel() for p in model.decoder.parameters()):,} parameters", flush=True)
    trainer = ImageTokenizerTrainer(
        script=script,
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=lambda prediction: measure(prediction, model.config.codebook_size),
    )
    run_training(trainer)
    trainer.save_model()
    LibraImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        args.output_dir
    )
    if validation is None:
        return {}
    metrics = trainer.evaluate()
    Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2), flush=True)
    return metrics


if __name__ == "__main__":
    main()
