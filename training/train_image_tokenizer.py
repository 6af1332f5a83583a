"""
Stage 0: the image tokenizer (Section 3.1): quantizer and decoder around a frozen CLIP.

    python -m training.train_image_tokenizer --config training/configs/tiny/image_tokenizer.yaml
    python -m training.train_image_tokenizer --config training/configs/image_tokenizer_11b.yaml --dataset IMAGES
    accelerate launch -m training.train_image_tokenizer --config my.yaml --dataset IMAGES --clip CLIP

The loss is that of VQGAN around a lookup-free quantizer:

    l1_weight * L1 + mse_weight * MSE + perceptual_weight * perceptual        reconstruction
    + gan_weight * adaptive_weight * generator                                 from step gan_start on
    + entropy_loss_weight * (per_sample_entropy - diversity_gamma * codebook_entropy)
    + commitment_loss_weight * commitment                                      quantizer, weights in tokenizer_config

A run goes on from the last checkpoint in `output_dir` by itself. Written there: the image tokenizer, its image
processor, pictures of reconstructions, and `metrics.json` (PSNR, SSIM, and how much of each codebook is in use).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import EvalPrediction, set_seed

from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer

from .checkpoints import last_checkpoint
from .discriminator import Adversary, PatchDiscriminator
from .fit_bits import fit_bits
from .fresh_encoder import FreshEncoderTokenizer, freeze_encoder
from .image_tokenizer_losses import PERCEPTUAL_TERMS, adaptive_weight, encoder_distance, load_lpips
from .images import to_pixel_values
from .loss_terms import LossTermsTrainer
from .reconstruction import ReconstructionGrids, clip_to_unit, codebook_use, count_codes, psnr, ssim
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
        dataset (`str`, *optional*, defaults to `"world"`): `"world"`, or a folder of images. Images in its subfolders
            `train` and `validation`, if there are such, are for training and evaluation.
        icons (`str`, *optional*): Folder with iconify JSON files; by default they are installed with npm.
        tokenizer_config (`dict`, *optional*): Settings of `LibraImageTokenizerConfig`.
        codes_of (`str`, *optional*): Folder of a trained image tokenizer with the same CLIP whose codes are kept: only a
            new decoder is trained, and models that were trained on these codes stay valid.
        start_from (`str`, *optional*): Folder of a trained image tokenizer of the same sizes whose quantizer and decoder
            are trained further, around the CLIP given here; by default they start fresh.
        fit_bits_steps (`int`, *optional*, defaults to 0): Steps in which the bits are fitted to pixels before the decoder
            is trained, see [`~training.fit_bits`]; they stay as they are then. For small models: it runs on the CPU and
            holds the features of 8192 images. 0, as in the paper: trained together.
        encoder_from_scratch (`bool`, *optional*, defaults to `False`): Row (g) of the paper's Table 3: the encoder has the
            sizes of `clip` but fresh weights, and is trained together with quantizer and decoder.
        other_emoji (`bool`, *optional*, defaults to `True`): Whether scenes show further emoji beside the concepts.
        augmentation (`dict`, *optional*): Settings of [`~training.world.augment.Augmentation`].
        train_samples (`int`, *optional*, defaults to 100000): Scenes of the world in an epoch.
        eval_samples (`int`, *optional*, defaults to 200): Scenes of the validation split.
        l1_weight (`float`, *optional*, defaults to 1.0): Weight of the absolute error of pixels in [-1, 1].
        mse_weight (`float`, *optional*, defaults to 1.0): Weight of their squared error; 0 in the authors' code.
        perceptual (`str`, *optional*, defaults to `"encoder"`): The perceptual term: `"lpips"` as in the authors' code
            (needs `pip install 'libra-vlm[lpips]'`), `"encoder"` (features of the frozen CLIP) or `"none"`.
        perceptual_weight (`float`, *optional*, defaults to 0.1): Its weight.
        perceptual_layer (`int`, *optional*, defaults to 2): Hidden state of CLIP whose distance `"encoder"` takes.
        gan_weight (`float`, *optional*, defaults to 0.0): Weight of the adversarial term beside its adaptive weight; 0 for
            no discriminator at all.
        gan_start (`int`, *optional*, defaults to 0): The first step, counted from 0, with the adversarial term and the
            first in which the discriminator is trained.
        discriminator_channels (`int`, *optional*, defaults to 64): See [`~training.discriminator.PatchDiscriminator`].
        discriminator_layers (`int`, *optional*, defaults to 3): See [`~training.discriminator.PatchDiscriminator`].
        discriminator_learning_rate (`float`, *optional*): Peak learning rate; by default `learning_rate`.
        grid_steps (`int`, *optional*, defaults to 0): Steps between two pictures of reconstructions; 0 for one at the end.
        grid_images (`int`, *optional*, defaults to 8): Images in such a picture, the first of the evaluation set (of the
            training set if there is none).

    Raises:
        ValueError: For a setting outside its range, or a loss without any reconstruction term.
        FileNotFoundError: If `dataset` is no folder.
    """

    clip: str = field(metadata={"help": "Folder or Hub repo of the CLIP vision tower."})
    dataset: str = field(default="world", metadata={"help": "'world', or a folder of images."})
    icons: str | None = field(default=None, metadata={"help": "Folder with iconify JSON files (default: npm)."})
    tokenizer_config: dict = field(default_factory=dict, metadata={"help": "Settings of LibraImageTokenizerConfig."})
    codes_of: str | None = field(default=None, metadata={"help": "Image tokenizer whose codes are kept."})
    start_from: str | None = field(default=None, metadata={"help": "Image tokenizer that is trained further."})
    fit_bits_steps: int = field(default=0, metadata={"help": "Steps in which bits are fitted before (0: not)."})
    encoder_from_scratch: bool = field(default=False, metadata={"help": "Whether the encoder is fresh, and trained."})
    other_emoji: bool = field(default=True, metadata={"help": "Whether scenes show further emoji."})
    augmentation: dict = field(default_factory=dict, metadata={"help": "Settings of Augmentation."})
    train_samples: int = field(default=100_000, metadata={"help": "Scenes of the world in an epoch."})
    eval_samples: int = field(default=200, metadata={"help": "Scenes of the validation split."})
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the absolute error."})
    mse_weight: float = field(default=1.0, metadata={"help": "Weight of the squared error."})
    perceptual: str = field(default="encoder", metadata={"help": "Perceptual term: lpips, encoder or none."})
    perceptual_weight: float = field(default=0.1, metadata={"help": "Weight of the perceptual term."})
    perceptual_layer: int = field(default=2, metadata={"help": "Hidden state whose distance 'encoder' takes."})
    gan_weight: float = field(default=0.0, metadata={"help": "Weight of the adversarial term; 0: no discriminator."})
    gan_start: int = field(default=0, metadata={"help": "The first step with the adversarial term, counted from 0."})
    discriminator_channels: int = field(default=64, metadata={"help": "Channels of its first convolution."})
    discriminator_layers: int = field(default=3, metadata={"help": "Its convolutions that halve the image."})
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Its peak learning rate (default: learning_rate)."}
    )
    grid_steps: int = field(default=0, metadata={"help": "Steps between pictures of reconstructions; 0: at the end."})
    grid_images: int = field(default=8, metadata={"help": "Images in such a picture."})

    def __post_init__(self) -> None:
        if self.dataset != "world" and not Path(self.dataset).is_dir():
            raise FileNotFoundError(f"{self.dataset} is not a folder. Give 'world', or a folder of images.")
        if self.perceptual not in PERCEPTUAL_TERMS:
            raise ValueError(f"perceptual must be one of {', '.join(PERCEPTUAL_TERMS)}, found {self.perceptual!r}.")
        not_negative = ("l1_weight", "mse_weight", "perceptual_weight", "gan_weight", "gan_start", "grid_steps")
        for name in (*not_negative, "fit_bits_steps"):
            value = vars(self)[name]
            if value < 0:
                raise ValueError(f"{name} must not be negative, found {value}.")
        for name in ("perceptual_layer", "grid_images", "train_samples"):
            value = vars(self)[name]
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        if self.encoder_from_scratch and (self.codes_of or self.perceptual == "encoder"):
            raise ValueError(
                "encoder_from_scratch trains the encoder: leave codes_of out, and set perceptual to lpips or none; a "
                "distance of features needs an encoder that stays as it is."
            )
        if self.fit_bits_steps and (self.codes_of or self.encoder_from_scratch):
            raise ValueError(
                "fit_bits_steps makes new codes around a frozen encoder: leave out codes_of and encoder_from_scratch, or "
                "set it to 0."
            )
        if not any(self.reconstruction_weights.values()):
            raise ValueError(
                "The loss has no reconstruction term: set l1_weight, mse_weight or perceptual_weight above 0."
            )

    @property
    def reconstruction_weights(self) -> dict[str, float]:
        """`dict[str, float]`: The weights of the reconstruction terms, by the name of the term."""
        perceptual = {} if self.perceptual == "none" else {"perceptual": self.perceptual_weight}
        return {"l1": self.l1_weight, "mse": self.mse_weight, **perceptual}

    def check(self, config: LibraImageTokenizerConfig) -> None:
        """
        Compares the settings with the model that is trained.

        Args:
            config ([`LibraImageTokenizerConfig`]): That of the model.

        Raises:
            ValueError: If images and reconstructions differ in size, or CLIP has no such layer as `perceptual_layer`.
        """
        if config.resolution != config.vision_config.image_size:
            raise ValueError(
                f"The decoder draws {config.resolution} pixels a side, and the images of this CLIP have "
                f"{config.vision_config.image_size}: set resolution in tokenizer_config to the latter."
            )
        deepest = max(config.select_layers)
        if self.perceptual == "encoder" and self.perceptual_layer > deepest:
            raise ValueError(
                f"perceptual_layer is {self.perceptual_layer}, but CLIP runs no deeper than select_layers, to {deepest}."
            )


class PixelSamples(Dataset):
    """
    Images alone, as CLIP sees them.

    Args:
        source ([`World`] or `datasets.Dataset`): Where the images come from; of a dataset, the column `image`.
        image_size (`int`): Side of the images.
    """

    def __init__(self, source: Any, image_size: int) -> None:
        self.source = source
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index`: `pixel_values` `(3, size, size)`."""
        sample = self.source[index]
        image: Image.Image = sample.image if isinstance(sample, Scene) else sample["image"]
        return {"pixel_values": to_pixel_values(image, self.image_size)}


class ImageTokenizerTrainer(LossTermsTrainer):
    """
    A Trainer for [`LibraImageTokenizer`]: adds reconstruction and adversarial terms to the loss of the quantizer, trains
    the discriminator, logs all of it.

    Args:
        script ([`ImageTokenizerArguments`]): For the weights of the terms.
        lpips (`nn.Module`, *optional*): See [`~training.image_tokenizer_losses.load_lpips`]; for `perceptual: lpips`.
        kwargs: As in transformers' `Trainer`.

    Raises:
        ValueError: If there is to be a discriminator and it cannot be trained that way: images too small for it, fp16,
            DeepSpeed or FSDP, a learning rate that follows the loss.
    """

    def __init__(self, script: ImageTokenizerArguments, lpips: nn.Module | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.script = script
        self.lpips = None if lpips is None else lpips.to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its batch
        self.label_names = ["pixel_values"]  # images are their own targets in evaluation
        self.adversary = self._new_adversary() if script.gan_weight else None
        self._reconstructed: tuple[Tensor, Tensor] | None = None  # images and reconstructions of the batch at hand
        self._code_counts = self._no_codes()

    def _new_adversary(self) -> Adversary:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("The discriminator is trained on one device or with DDP: turn DeepSpeed and FSDP off.")
        if self.args.fp16:
            raise ValueError(
                "fp16 has one loss scale, and decoder and discriminator need two: use bf16 or gan_weight 0."
            )
        schedule = SchedulerType(self.args.lr_scheduler_type).value
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type {schedule} follows the loss, and there are two here: choose "
                "one that depends on the step alone, such as cosine."
            )
        discriminator = PatchDiscriminator(self.script.discriminator_channels, self.script.discriminator_layers)
        if self.model.config.resolution < discriminator.smallest_image:
            raise ValueError(
                f"Images of {self.model.config.resolution} pixels are too small for a discriminator of "
                f"{self.script.discriminator_layers} layers, which needs {discriminator.smallest_image}: set "
                "discriminator_layers lower."
            )
        learning_rate = self.script.discriminator_learning_rate
        if learning_rate is None:
            learning_rate = self.args.learning_rate
        return Adversary(discriminator, self.accelerator, self.args, learning_rate, self.script.gan_start)

    def _no_codes(self) -> Tensor:
        config = self.model.config
        return torch.zeros(config.num_codebooks, config.codebook_size, dtype=torch.long, device=self.args.device)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The learning rate schedule, and with it optimizer and schedule of the discriminator."""
        if self.adversary:
            self.adversary.prepare(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.adversary and self.args.should_save:
            self.adversary.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.adversary and checkpoint is not None:
            self.adversary.load(checkpoint)

    def reconstruction_terms(
        self, model: LibraImageTokenizer, reconstruction: Tensor, pixels: Tensor
    ) -> dict[str, Tensor]:
        """
        The distances between images and their reconstructions, unweighted.

        Args:
            model ([`LibraImageTokenizer`]): Its frozen CLIP gives the perceptual term `"encoder"`.
            reconstruction (`torch.Tensor` of shape `(n, 3, h, w)`): In [-1, 1].
            pixels (`torch.Tensor` of shape `(n, 3, h, w)`): As CLIP reads them.
        """
        target = clip_to_unit(pixels)
        terms = {"l1": F.l1_loss(reconstruction, target), "mse": F.mse_loss(reconstruction, target)}
        if self.lpips is not None:
            terms["perceptual"] = self.lpips(reconstruction, target).mean()
        elif self.script.perceptual == "encoder":
            layer = self.script.perceptual_layer
            terms["perceptual"] = encoder_distance(model, reconstruction, pixels, layer)
        return terms

    def adversarial_terms(
        self, model: LibraImageTokenizer, reconstruction: Tensor, reconstruction_loss: Tensor
    ) -> dict[str, Tensor]:
        """
        The generator loss and its adaptive weight.

        Args:
            model ([`LibraImageTokenizer`]): Its decoder is the generator.
            reconstruction (`torch.Tensor` of shape `(n, 3, h, w)`): In [-1, 1].
            reconstruction_loss (`torch.Tensor` of shape `()`): The weighted sum of the reconstruction terms.
        """
        assert self.adversary
        generator = self.adversary.generator_loss(reconstruction)
        last_layer = model.decoder.conv_out.weight
        # means over the devices, so that all of them weigh alike, and as one device would with the whole batch
        gradients = [
            self.accelerator.reduce(torch.autograd.grad(loss, last_layer, retain_graph=True)[0], "mean")
            for loss in (reconstruction_loss, generator)
        ]
        return {"generator": generator, "adaptive_weight": adaptive_weight(*gradients)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch; in evaluation, without the adversarial term. Its terms are kept for the next log."""
        pixels = inputs["pixel_values"]
        outputs = model(pixel_values=pixels, return_losses=True)
        bare_model = self.accelerator.unwrap_model(model)
        terms = self.reconstruction_terms(bare_model, outputs.reconstruction, pixels)
        weights = self.script.reconstruction_weights
        reconstruction_loss = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
        loss = outputs.loss + reconstruction_loss
        target, reconstruction = clip_to_unit(pixels), outputs.reconstruction.detach()
        scores = {"psnr": psnr(reconstruction, target)}  # (n,)
        if self.model.training and self._adversary_is_on:
            terms |= self.adversarial_terms(bare_model, outputs.reconstruction, reconstruction_loss)
            loss = loss + self.script.gan_weight * terms["adaptive_weight"] * terms["generator"]
            self._reconstructed = (target, reconstruction)
        if self.model.training:
            self._code_counts += count_codes(outputs.codes, self.model.config.codebook_size)
        if not self.model.training or self._is_logged:
            scores["ssim"] = ssim(reconstruction, target)  # (n,)
        terms |= {name: outputs[name] for name in ("per_sample_entropy", "codebook_entropy", "commitment")}
        self.keep_terms(terms | {name: values.mean() for name, values in scores.items()})
        return (loss, {"loss": loss, **scores, "codes": outputs.codes}) if return_outputs else loss

    @property
    def _adversary_is_on(self) -> bool:
        return self.adversary is not None and self.state.global_step >= self.adversary.start

    @property
    def _is_logged(self) -> bool:
        """Whether a log follows the step at hand: SSIM costs a small model a tenth of its step, and is not kept for
        every one."""
        return (self.state.global_step + 1) % self.state.logging_steps == 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A step of the decoder's training, then one of the discriminator's on the same reconstructions."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._reconstructed is not None:
            assert self.adversary
            target, reconstruction = self._reconstructed
            self.keep_terms(self.adversary.update(target, reconstruction, self.current_gradient_accumulation_steps))
            self._reconstructed = None
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the use of the codebooks in training since the last log, on all devices, and the terms of the loss."""
        if "loss" in logs:
            logs.update(codebook_use(self.accelerator.reduce(self._code_counts, "sum")))
            self._code_counts = self._no_codes()
        super().log(logs, start_time)


def take_over(model: LibraImageTokenizer, folder: str, parts: Sequence[str]) -> None:
    """
    Copies parts of a trained image tokenizer.

    Args:
        model ([`LibraImageTokenizer`]): Changed in place; its other parts stay as they are.
        folder (`str`): The trained image tokenizer.
        parts (`Sequence[str]`): Names of its modules.

    Raises:
        RuntimeError: If their sizes are others.
    """
    trained = LibraImageTokenizer.from_pretrained(folder)
    for name in parts:
        getattr(model, name).load_state_dict(getattr(trained, name).state_dict())


def keep_codes(model: LibraImageTokenizer, folder: str) -> None:
    """
    Takes over the encoder and the quantizer of a trained image tokenizer and freezes them.

    Args:
        model ([`LibraImageTokenizer`]): Changed in place; its decoder stays as it is.
        folder (`str`): The trained image tokenizer.

    Raises:
        RuntimeError: If its sizes before the decoder are others.
    """
    parts = ("clip", "pre_quant", "quantizer")
    take_over(model, folder, parts)
    for name in parts:
        getattr(model, name).requires_grad_(False)


def load_images(script: ImageTokenizerArguments, image_size: int) -> tuple[PixelSamples, PixelSamples | None]:
    """
    Training and evaluation images; a folder without a subfolder `validation` has no evaluation part.

    Args:
        script ([`ImageTokenizerArguments`]): Where from.
        image_size (`int`): Side of the images.
    """
    if script.dataset != "world":
        splits = load_dataset("imagefolder", data_dir=script.dataset)
        held_out = PixelSamples(splits["validation"], image_size) if "validation" in splits else None
        return PixelSamples(splits["train"], image_size), held_out
    source = Path(script.icons) if script.icons else install_icons()
    concepts = training_subjects(source)
    subjects = concepts + (load_other_subjects(load_concepts(len(concepts)), source) if script.other_emoji else [])
    augmentation = Augmentation(**script.augmentation) if script.augmentation else None
    train = World(subjects, "train", script.train_samples, augmentation=augmentation)
    return PixelSamples(train, image_size), PixelSamples(World(concepts, "validation", script.eval_samples), image_size)


def measure(prediction: EvalPrediction, codebook_size: int) -> dict[str, float]:
    """PSNR, SSIM and the use of the codebooks over an evaluation set."""
    psnrs, ssims, codes = prediction.predictions
    scores = {"psnr": round(float(psnrs.mean()), 3), "ssim": round(float(ssims.mean()), 4)}
    return scores | codebook_use(count_codes(torch.from_numpy(codes), codebook_size))


def fixed_images(dataset: PixelSamples, count: int) -> Tensor:
    """The first `count` images of a dataset, or as many as there are: `(n, 3, size, size)`."""
    return torch.stack([dataset[i]["pixel_values"] for i in range(min(count, len(dataset)))])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """
    Train, save and measure.

    Args:
        arguments (`list[str]`, *optional*): Command line; by default that of the process.

    Returns:
        `dict[str, float]`: The metrics on the evaluation set (of the world, new scenes of the training vendors); empty if
            there is none.
    """
    script, args = StageParser("tokenizer", (ImageTokenizerArguments, TrainingArguments)).parse_args_and_config(
        arguments
    )
    args.remove_unused_columns = False
    announce_run(args, "tokenizer")
    set_seed(args.seed)
    lpips = load_lpips() if script.perceptual == "lpips" else None
    # whatever the CLIP is stored in: AdamW's steps are lost in half precision, which is what `bf16` is for
    model = LibraImageTokenizer.from_clip(script.clip, **script.tokenizer_config).float()
    script.check(model.config)
    if script.encoder_from_scratch:
        model = FreshEncoderTokenizer(model.config)
    if script.start_from:
        take_over(model, script.start_from, ("pre_quant", "quantizer", "post_quant", "decoder"))
    if script.codes_of:
        keep_codes(model, script.codes_of)
    size = model.config.vision_config.image_size
    train, validation = load_images(script, size)
    pictured = fixed_images(train if validation is None else validation, script.grid_images)
    if script.fit_bits_steps:
        if last_checkpoint(args.output_dir) is None:
            fit_bits(model, train, script.fit_bits_steps)
        model.pre_quant.requires_grad_(False)
        model.quantizer.project_in.requires_grad_(False)
    print(f"Decoder: {sum(p.numel() for p in model.decoder.parameters()):,} parameters", flush=True)
    trainer = ImageTokenizerTrainer(
        script=script,
        lpips=lpips,
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=lambda prediction: measure(prediction, model.config.codebook_size),
        callbacks=[ReconstructionGrids(pictured, script.grid_steps)],
    )
    run_training(trainer)
    if isinstance(model, FreshEncoderTokenizer):
        freeze_encoder(model)
    trainer.save_model()
    if args.should_save:
        processor = LibraImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        processor.save_pretrained(args.output_dir)
    if validation is None:
        return {}
    metrics = trainer.evaluate()
    if args.should_save:
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(json.dumps(metrics, indent=2), flush=True)
    return metrics


if __name__ == "__main__":
    main()
