"""Stage 1, pretraining (Section 4.1): the vision system learns to predict codes and captions; the LLM stays frozen.

Launch, at tiny size:

    python -m training.pretrain --config training/configs/tiny/pretrain.yaml

from what `libra init LLM CLIP DIR` wrote:

    python -m training.pretrain --config my_pretrain.yaml --model DIR

on several GPUs or machines (ENGINES.md has the engines, and the memory they need), at the paper's size:

    accelerate launch --config_file training/configs/accelerate/fsdp2.yaml -m training.pretrain \\
        --config training/configs/pretrain_11b.yaml --model DIR --dataset "TARS/*.tar" --gradient_accumulation_steps 8

Every field of [`PretrainArguments`], [`~training.data.DataArguments`], [`~training.caption_stream.CaptionArguments`] and
transformers' `TrainingArguments` is a key of the YAML file and a command line flag; flags win. A run goes on from the
last checkpoint in `output_dir` by itself.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments, set_seed

from libra_cli.init import init_libra
from libra_cli.loading import load_libra
from modeling_libra import LibraForCausalLM
from processing.processing_libra import LibraProcessor

from .caption_stream import CaptionArguments, CaptionStream, CheckedRows, Reading, SampleReader
from .captions import CaptionSource
from .data import DataArguments, load_caption_data
from .feature_regression import FeatureHead
from .frozen import FrozenParametersCheck
from .run import StageParser, announce_run, check_global_batch, run_training, save_result
from .stream_trainer import StreamTrainer
from .throughput import Throughput

VISION_SUPERVISION = ("codes", "none", "features")
"""What of images is predicted: their codes, or, in rows (a) and (b) of the paper's Table 3, nothing or features."""


@dataclass
class PretrainArguments:
    """
    What is pretrained: a whole Libra, or a fresh one made of its two parts.

    Args:
        model (`str`, *optional*): folder or Hub repo of a Libra, such as `libra init` writes.
        language_model (`str`, *optional*): folder or Hub repo of the pretrained language model.
        image_tokenizer (`str`, *optional*): folder of the trained image tokenizer.
        text_to_image_fraction (`float`, *optional*, defaults to 0.0):
            Share of samples in which the image comes after its caption, without its continuous features, so that the
            model learns to draw.
        vision_supervision (`str`, *optional*, defaults to `"codes"`):
            What is predicted of images. `"none"` is row (a) of Table 3, "language supervision only". `"features"` is
            row (b), "contiguous supervision": the continuous features of the next patch, see
            [`~training.feature_regression.FeatureHead`].
        vision_system (`dict`, *optional*):
            Fields of [`LibraConfig`] for a fresh vision system, such as `use_expert`, `use_bridge` and
            `use_continuous_features`, rows (d), (e) and (f) of Table 3.
        global_batch_size (`int`, *optional*):
            Samples of all devices in a step. The run stops at once if the settings of batch and devices make another.
    """

    model: str = field(default="", metadata={"help": "Folder or Hub repo of a Libra."})
    language_model: str = field(default="", metadata={"help": "Folder or Hub repo of the language model."})
    image_tokenizer: str = field(default="", metadata={"help": "Folder of the trained image tokenizer."})
    text_to_image_fraction: float = field(
        default=0.0, metadata={"help": "Share of samples with the image after its caption, in [0, 1]."}
    )
    vision_supervision: str = field(default="codes", metadata={"help": "Of images: codes, none or features."})
    vision_system: dict = field(default_factory=dict, metadata={"help": "Fields of LibraConfig, if it is fresh."})
    global_batch_size: int | None = field(default=None, metadata={"help": "Samples of all devices in a step, checked."})

    def __post_init__(self):
        if not 0 <= self.text_to_image_fraction <= 1:
            raise ValueError(f"text_to_image_fraction must be in [0, 1], found {self.text_to_image_fraction}.")
        parts = (self.language_model, self.image_tokenizer)
        if any(parts) if self.model else not all(parts):
            raise ValueError("Pass either model, or language_model and image_tokenizer.")
        if self.model and self.vision_system:
            raise ValueError(f"vision_system cannot be chosen: that of {self.model} is there already.")
        if self.vision_supervision not in VISION_SUPERVISION:
            raise ValueError(
                f"vision_supervision must be one of {', '.join(VISION_SUPERVISION)}, found {self.vision_supervision!r}."
            )
        if self.text_to_image_fraction and self.vision_supervision != "codes":
            raise ValueError(
                f"vision_supervision is {self.vision_supervision}, but images are drawn as codes: set "
                "text_to_image_fraction to 0."
            )

    def load(self, seed: int) -> tuple[LibraForCausalLM, LibraProcessor]:
        """Model and processor; `seed` is that of the parameters of a fresh vision system."""
        if self.model:
            return load_libra(self.model)
        return init_libra(self.language_model, self.image_tokenizer, seed, self.vision_system)


@dataclass
class PretrainCollator:
    """
    Samples to batches of the pretraining layouts (Section 4.1):

    - image to text: BOS, image, "\\n", caption, EOS; codes and caption are supervised;
    - text to image: BOS, caption, image, "\\n", EOS; codes only are supervised, and the features are dropped.

    Args:
        processor ([`LibraProcessor`]): makes ids. It stops at pixels: the trainer tokenizes them on the device.
        text_to_image_fraction (`float`, *optional*, defaults to 0.0): share of text-to-image samples.
        seed (`int`, *optional*, defaults to 0):
            Which samples these are is a function of the seed and the place of a sample in the data, so that it is the
            same after a restart.
        vision_supervision (`str`, *optional*, defaults to `"codes"`):
            As in [`PretrainArguments`]: whether labels have the codes and EOI of images, nothing of them, or the codes
            alone, in place of the patches whose features are predicted.
    """

    processor: LibraProcessor
    text_to_image_fraction: float = 0.0
    seed: int = 0
    vision_supervision: str = "codes"

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples (`list` of `dict`):
                `image` (`PIL.Image.Image`), `text` (`str`) and, unless the fraction is 0 or 1, `place` (`tuple` of
                `int`) each; `reading` ([`Reading`]) in those of a stream.

        Returns:
            `dict` with `input_ids`, `attention_mask` and `labels` of shape `(batch, length)`, `pixel_values` of shape
            `(batch, 3, height, width)`, and `draws` (`torch.BoolTensor` of shape `(batch,)`): text-to-image rows. In
            place of every code, in ids and labels, is the first one, until the trainer has tokenized the pixels. From a
            stream also `reading`.

        Raises:
            ValueError: for an empty caption, naming the sample.
        """
        eos = self.processor.tokenizer.eos_token
        draws = torch.tensor([self._draws(sample) for sample in samples])
        texts = []
        for place, (sample, draw) in enumerate(zip(samples, draws)):
            caption = sample["text"].strip()
            if not caption:
                raise ValueError(f"Sample {place} of the batch has an empty caption; filter such samples before.")
            texts.append(f"{caption} <image>\n{eos}" if draw else f"<image>\n{caption}{eos}")
        batch = self.processor(
            text=texts,
            images=[[sample["image"]] for sample in samples],
            padding=True,
            padding_side="right",
            tokenize_images=False,
            return_tensors="pt",
        )
        batch["draws"] = draws
        labels = pretraining_labels(batch["input_ids"], batch["attention_mask"], draws, self.processor)
        if self.vision_supervision == "none":
            labels = labels.masked_fill(labels >= self.processor.text_vocab_size, -100)
        elif self.vision_supervision == "features":  # codes mark the patches that have features; EOI has none
            labels = labels.masked_fill(labels == self.processor.eoi_token_id, -100)
        batch["labels"] = labels
        batch = dict(batch)
        if "reading" in samples[0]:
            batch["reading"] = Reading.of_batch([sample["reading"] for sample in samples])
        return batch

    def _draws(self, sample: dict[str, Any]) -> bool:
        """Whether the image of a sample is to be drawn from its caption."""
        if self.text_to_image_fraction in (0, 1):
            return bool(self.text_to_image_fraction)
        return np.random.default_rng([self.seed, *sample["place"]]).random() < self.text_to_image_fraction


def pretraining_labels(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, draws: torch.Tensor, processor: LibraProcessor
) -> torch.Tensor:
    """
    Labels of a pretraining batch.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(batch, length)`): flat ids and padding on the right.
        draws (`torch.BoolTensor` of shape `(batch,)`): text-to-image rows; their text is not supervised.
        processor ([`LibraProcessor`]): knows which ids are text, BOI and EOI.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`: ids, -100 where nothing is supervised. That includes BOS, BOI and
        the newline after an image, which [`modeling_libra.loss_libra.libra_loss`] leaves out as well: the Trainer
        divides the loss by the number of labels.
    """
    is_text = input_ids < processor.text_vocab_size
    follows_image = (input_ids == processor.eoi_token_id).roll(1, dims=1)
    ignored = (attention_mask == 0) | (draws[:, None] & is_text) | (input_ids == processor.boi_token_id) | follows_image
    ignored[:, 0] = True
    return input_ids.masked_fill(ignored, -100)


def drop_features_of_drawn(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Leaves images that are to be drawn without features: who draws has none.

    Args:
        batch (`dict`): of [`PretrainCollator`], tokenized.

    Returns:
        `dict`: a new one, without `draws`.
    """
    features = batch["image_features"].masked_fill(batch["draws"][:, None, None], 0.0)
    return {name: value for name, value in batch.items() if name != "draws"} | {"image_features": features}


def freeze_language_model(model: nn.Module) -> tuple[int, int]:
    """
    Leaves only the vision system trainable: the parameters with `vision` in their names.

    Args:
        model ([`LibraForCausalLM`]): changed in place.

    Returns:
        `tuple` of two `int`: numbers of trainable and of frozen parameters.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" in name)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable


def use_full_precision(model: nn.Module, mixed: bool) -> None:
    """
    Holds what is trained in float32, whatever dtype it was stored in: an update of 1e-4 is lost in the 8 bits of a
    bfloat16 weight. Frozen weights stay as they are if the Trainer casts for computing, else they must fit the others.

    Args:
        model (`nn.Module`): changed in place.
        mixed (`bool`): whether the run computes in mixed precision (`bf16` or `fp16`).
    """
    for parameter in model.parameters():
        if parameter.requires_grad or not mixed:
            parameter.data = parameter.data.float()


class LibraPretrainer(StreamTrainer):
    """
    A Trainer that tokenizes images on the device, in batches, and logs, beside the loss, those of the text, of the image
    and of each codebook, tokens per second (padding does not count) and peak memory. A frozen parameter that changes is
    an error, see [`~training.frozen.FrozenParametersCheck`].

    Args:
        model ([`LibraForCausalLM`]): its language model should be frozen, see [`freeze_language_model`].
        processing_class ([`LibraProcessor`]): its image tokenizer is moved to the device of the model.
        feature_head ([`~training.feature_regression.FeatureHead`], *optional*):
            A module of the model, which predicts images instead of the vision heads.
        kwargs: as in transformers' `Trainer`. `remove_unused_columns` must be off: the collator reads raw samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: LibraProcessor,
        feature_head: FeatureHead | None = None,
        **kwargs,
    ):
        super().__init__(model=model, processing_class=processing_class, **kwargs)
        self.feature_head = feature_head
        processing_class.image_tokenizer.to(self.args.device).eval()
        self._throughput = Throughput(self.accelerator)
        self.add_callback(FrozenParametersCheck)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.model.training:
            self._throughput.count(inputs["attention_mask"])
        if "pixel_values" not in inputs:
            return inputs
        return drop_features_of_drawn(dict(self.processing_class.tokenize_images(inputs)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The model's own loss, divided by the number of supervised tokens of the whole step, whatever processes and
        accumulation cut it into; that of each modality and of each codebook is kept for the log.
        """
        labels = inputs["labels"]
        is_vision = labels >= self.processing_class.text_vocab_size
        is_text = (labels >= 0) & ~is_vision
        inputs = {**inputs, "use_cache": False}
        if self.feature_head is not None:  # the head predicts the patches, and the model the text
            inputs |= {"labels": labels.masked_fill(is_vision, -100), "output_hidden_states": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.keep_terms({"text_loss": outputs.text_loss}, {"text_loss": is_text.sum()})
        if self.feature_head is None:
            terms = {"vision_loss": outputs.vision_loss}
            terms |= {f"codebook_{place}_loss": term for place, term in enumerate(outputs.codebook_losses, start=1)}
            self.keep_terms(terms, dict.fromkeys(terms, is_vision.sum()))
        else:
            errors = self.feature_head(outputs.hidden_states[-1], inputs["input_ids"], inputs["image_features"])
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = self.feature_head.joint_loss(loss, errors, is_text.sum(), num_items_in_batch, processes)
            self.keep_terms({"feature_loss": errors.mean()})
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds speed and memory to the log of training."""
        if "loss" in logs:
            logs |= self._throughput.read()
        super().log(logs, start_time)


def open_sources(
    data: DataArguments, captions: CaptionArguments, args: TrainingArguments
) -> tuple[CaptionSource, CaptionSource | None] | None:
    """
    Finds the data, before the model is loaded.

    Args:
        data ([`DataArguments`]): where they are.
        captions ([`CaptionArguments`]): how to read them.
        args (`TrainingArguments`): of the run.

    Returns:
        `tuple` or `None`: rows to train on, and to evaluate on if asked for; None for the world's, which are drawn.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for data that have no captioned images, or a run without `max_steps`.
    """
    if data.dataset == "world":
        return None
    if args.max_steps < 1:
        raise ValueError("Set max_steps: a stream of samples has no end, so num_train_epochs says nothing.")
    if args.eval_strategy != "no" and captions.eval_dataset is None and captions.eval_split is None:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy}: set eval_dataset or eval_split, or eval_strategy: no."
        )
    return captions.open(data.dataset, captions.split), captions.open_eval(data.dataset)


def make_datasets(
    sources: tuple[CaptionSource, CaptionSource | None],
    data: DataArguments,
    captions: CaptionArguments,
    processor: LibraProcessor,
    args: TrainingArguments,
) -> tuple[CaptionStream, CheckedRows | None]:
    """
    Training and evaluation data of one's own.

    Args:
        sources (`tuple`): as [`open_sources`] returns them.
        data ([`DataArguments`]): number of evaluation samples.
        captions ([`CaptionArguments`]): how to read them.
        processor ([`LibraProcessor`]): whose special tokens captions must not have.
        args (`TrainingArguments`): seed and processes.

    Returns:
        `tuple`: the stream to train on, and samples to evaluate on, if asked for.
    """
    source, eval_source = sources
    reserved = processor.tokenizer.all_special_tokens
    stream = CaptionStream(
        source.rows,
        SampleReader(source, captions, reserved),
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle_buffer=captions.shuffle_buffer,
        max_skipped=captions.max_skipped,
        process=args.process_index,
        num_processes=args.world_size,
    )
    if eval_source is None:
        return stream, None
    return stream, CheckedRows(eval_source.rows, SampleReader(eval_source, captions, reserved), data.eval_samples)


def main(arguments: list[str] | None = None) -> None:
    """Runs the stage; `arguments` are those of the command line."""
    parser = StageParser("pretrain", (PretrainArguments, DataArguments, CaptionArguments, TrainingArguments))
    stage, data, captions, args = parser.parse_args_and_config(arguments)
    args.remove_unused_columns = False
    check_global_batch(args, stage.global_batch_size)
    announce_run(args, "pretrain")
    set_seed(args.seed)
    sources = open_sources(data, captions, args)
    model, processor = stage.load(args.seed)
    train_data: Dataset
    eval_data: Dataset | None
    if sources is None:
        train_data, eval_data = load_caption_data(data)
    else:
        train_data, eval_data = make_datasets(sources, data, captions, processor, args)
    feature_head = None
    if stage.vision_supervision == "features":
        model.vision_feature_head = feature_head = FeatureHead(model.config)
    trainable, frozen = freeze_language_model(model)
    use_full_precision(model, mixed=args.bf16 or args.fp16)
    if args.process_index == 0:
        print(f"Training {trainable:,} parameters of the vision system; {frozen:,} others are frozen.")
        if isinstance(train_data, CaptionStream):
            print(f"Reading {data.dataset}: {train_data.describe(args.dataloader_num_workers)}", flush=True)
    trainer = LibraPretrainer(
        model=model,
        processing_class=processor,
        feature_head=feature_head,
        args=args,
        data_collator=PretrainCollator(processor, stage.text_to_image_fraction, args.seed, stage.vision_supervision),
        train_dataset=train_data,
        eval_dataset=eval_data,
    )
    run_training(trainer)
    if feature_head is not None:
        del model.vision_feature_head
    save_result(trainer)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
