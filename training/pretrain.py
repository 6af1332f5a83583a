"""Stage 1, pretraining (Section 4.1): the vision system learns to predict codes and captions; the LLM stays frozen.

Launch, at tiny size:

    python -m training.pretrain --config training/configs/tiny/pretrain.yaml

from what `libra init LLM CLIP DIR` wrote:

    python -m training.pretrain --config my_pretrain.yaml --model DIR

on several GPUs (nothing in it is special to one machine):

    accelerate launch -m training.pretrain --config my_pretrain.yaml

Every field of [`PretrainArguments`], [`~training.data.DataArguments`] and transformers' `TrainingArguments` is a key of
the YAML file and a command line flag; flags win. A run goes on from the last checkpoint in `output_dir` by itself.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from libra_cli.init import init_libra
from libra_cli.loading import load_libra
from modeling_libra import LibraForCausalLM
from processing.processing_libra import LibraProcessor

from .data import DataArguments, load_caption_data
from .loss_terms import LossTermsTrainer
from .run import StageParser, announce_run, run_training


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
    """

    model: str = field(default="", metadata={"help": "Folder or Hub repo of a Libra."})
    language_model: str = field(default="", metadata={"help": "Folder or Hub repo of the language model."})
    image_tokenizer: str = field(default="", metadata={"help": "Folder of the trained image tokenizer."})
    text_to_image_fraction: float = field(
        default=0.0, metadata={"help": "Share of samples with the image after its caption, in [0, 1]."}
    )

    def __post_init__(self):
        if not 0 <= self.text_to_image_fraction <= 1:
            raise ValueError(f"text_to_image_fraction must be in [0, 1], found {self.text_to_image_fraction}.")
        parts = (self.language_model, self.image_tokenizer)
        if any(parts) if self.model else not all(parts):
            raise ValueError("Pass either model, or language_model and image_tokenizer.")

    def load(self, seed: int) -> tuple[LibraForCausalLM, LibraProcessor]:
        """Model and processor; `seed` is that of the parameters of a fresh vision system."""
        if self.model:
            return load_libra(self.model)
        return init_libra(self.language_model, self.image_tokenizer, seed)


@dataclass
class PretrainCollator:
    """
    Samples to batches of the pretraining layouts (Section 4.1):

    - image to text: BOS, image, "\\n", caption, EOS; codes and caption are supervised;
    - text to image: BOS, caption, image, "\\n", EOS; codes only are supervised, and the features are dropped.

    Args:
        processor ([`LibraProcessor`]): makes ids. It stops at pixels: the trainer tokenizes them on the device.
        text_to_image_fraction (`float`, *optional*, defaults to 0.0): share of text-to-image samples.
    """

    processor: LibraProcessor
    text_to_image_fraction: float = 0.0

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            samples (`list` of `dict`): `image` (`PIL.Image.Image`) and `text` (`str`) each.

        Returns:
            `dict` with `input_ids`, `attention_mask` and `labels` of shape `(batch, length)`, `pixel_values` of shape
            `(batch, 3, height, width)`, and `draws` (`torch.BoolTensor` of shape `(batch,)`): text-to-image rows. In
            place of every code, in ids and labels, is the first one, until the trainer has tokenized the pixels.

        Raises:
            ValueError: for an empty caption, naming the sample.
        """
        eos = self.processor.tokenizer.eos_token
        draws = torch.rand(len(samples)) < self.text_to_image_fraction
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
        batch["labels"] = pretraining_labels(
            batch["input_ids"], batch["attention_mask"], draws, self.processor.text_vocab_size
        )
        return dict(batch)


def pretraining_labels(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, draws: torch.Tensor, text_vocab_size: int
) -> torch.Tensor:
    """
    Labels of a pretraining batch.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(batch, length)`): flat ids and padding.
        draws (`torch.BoolTensor` of shape `(batch,)`): text-to-image rows; their text is not supervised.
        text_vocab_size (`int`): V.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`: ids, -100 where nothing is supervised. What the model never
        supervises (BOS, BOI, the newline after an image) may stay: see [`modeling_libra.loss_libra.libra_loss`].
    """
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    is_text = input_ids < text_vocab_size
    return labels.masked_fill(draws[:, None] & is_text, -100)


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


class LibraPretrainer(LossTermsTrainer):
    """
    A Trainer that tokenizes images on the device, in batches, and logs the losses of both modalities apart.

    Args:
        model ([`LibraForCausalLM`]): its language model should be frozen, see [`freeze_language_model`].
        processing_class ([`LibraProcessor`]): its image tokenizer is moved to the device of the model.
        kwargs: as in transformers' `Trainer`. `remove_unused_columns` must be off: the collator reads raw samples.
    """

    def __init__(self, model: PreTrainedModel, processing_class: LibraProcessor, **kwargs):
        super().__init__(model=model, processing_class=processing_class, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is already a mean over its micro-batch
        processing_class.image_tokenizer.to(self.args.device).eval()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if "pixel_values" not in inputs:
            return inputs
        draws = inputs.pop("draws")
        inputs = dict(self.processing_class.tokenize_images(inputs))
        inputs["image_features"] = inputs["image_features"].masked_fill(draws[:, None, None], 0.0)
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss; that of each modality is kept for the log."""
        outputs = model(**inputs, use_cache=False)
        self.keep_terms({name: outputs[name] for name in ("text_loss", "vision_loss")})
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def main(arguments: list[str] | None = None) -> None:
    """Runs the stage; `arguments` are those of the command line."""
    parser = StageParser("pretrain", (PretrainArguments, DataArguments, TrainingArguments))
    stage, data, args = parser.parse_args_and_config(arguments)
    args.remove_unused_columns = False
    announce_run(args, "pretrain")
    set_seed(args.seed)
    train_data, eval_data = load_caption_data(data)
    model, processor = stage.load(args.seed)
    trainable, frozen = freeze_language_model(model)
    print(f"Training {trainable:,} parameters of the vision system; {frozen:,} of the language model are frozen.")
    trainer = LibraPretrainer(
        model=model,
        processing_class=processor,
        args=args,
        data_collator=PretrainCollator(processor, stage.text_to_image_fraction),
        train_dataset=train_data,
        eval_dataset=eval_data,
    )
    run_training(trainer)
    trainer.save_model()
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
