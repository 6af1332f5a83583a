"""Stage 2, instruction tuning (Section 4.1): answers to questions about images, with TRL's `SFTTrainer`.

Launch, at tiny size:

    python -m training.sft --config training/configs/tiny/sft.yaml

with LLaVA's json as it is published, or any dataset with messages and images (see [`~training.conversations`]):

    accelerate launch --config_file training/configs/accelerate/fsdp2.yaml -m training.sft \\
        --config training/configs/sft_11b.yaml --model LIBRA --dataset llava_v1_5_mix665k.json --image_folder IMAGES \\
        --gradient_accumulation_steps 8

on one GPU, with LoRA or QLoRA (see [`~training.adapters`]):

    python -m training.sft --config training/configs/sft_qlora_11b.yaml --model LIBRA --dataset MY.json

Everything but the image tokenizer is trained, or the adapter; only answers are supervised (see [`~training.answers`]),
and samples of pretraining if any are rehearsed (see [`~training.rehearsal`]). Every field of [`SFTArguments`],
[`~training.data.DataArguments`], [`~training.conversations.ConversationArguments`],
[`~training.rehearsal.RehearsalArguments`], [`~training.unspoken.UnspokenArguments`],
[`~training.adapters.AdapterArguments`] and TRL's `SFTConfig` is a key of the YAML file and a command line flag; flags
win. A run goes on from the last checkpoint in `output_dir` by itself.
"""

import logging
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from libra_cli.loading import check_path, load_model
from processing.processing_libra import LibraProcessor

from .adapters import AdapterArguments
from .answers import AnswerCollator, ConversationCheck, check_supervision, row_length
from .conversations import ConversationArguments, read_conversations
from .data import DataArguments, load_world_conversations
from .device_tokenization import DeviceTokenization
from .loss_terms import LossTermsTrainer
from .rehearsal import Rehearsal, RehearsalArguments
from .run import StageParser, announce_run, check_global_batch, run_training, save_result
from .unspoken import UnspokenArguments, UnspokenNames, states_apart

logger = logging.getLogger(__name__)

CHECKED_SAMPLES = 8
"""Samples, from all over the data, whose supervised tokens are decoded before the training starts."""


@dataclass
class SFTArguments:
    """
    What is tuned.

    Args:
        model (`str`): folder or Hub repo of a pretrained Libra, with its processor.
        caption_prompt (`str`, *optional*): what the tuned model is asked for a caption when a user asks nothing; the
            image-to-text pipeline and `libra caption` read it from the saved processor.
        global_batch_size (`int`, *optional*):
            Samples of all devices in a step. The run stops at once if the settings of batch and devices make another.
    """

    model: str = field(metadata={"help": "Folder or Hub repo of a pretrained Libra, with its processor."})
    caption_prompt: str | None = field(default=None, metadata={"help": "What the tuned model is asked for a caption."})
    global_batch_size: int | None = field(default=None, metadata={"help": "Samples of all devices in a step, checked."})


class LibraSFTTrainer(DeviceTokenization, LossTermsTrainer, SFTTrainer):
    """
    TRL's trainer that tokenizes images on the device, in batches. If asked to, it rehearses pretraining, and draws what is
    had in mind to what was written.

    Args:
        model ([`LibraForCausalLM`]): is tuned.
        processing_class ([`LibraProcessor`]): its image tokenizer is moved to the device of the model.
        rehearsal ([`Rehearsal`], *optional*): pretraining samples of every step; their losses are logged as
            `rehearsal_text_loss` and `rehearsal_vision_loss`.
        unspoken ([`UnspokenNames`], *optional*): questions of every step in two forms; the loss of their answers and the
            distance of hidden states are logged as `unspoken_loss` and `unspoken_distance`.
        kwargs: as in TRL's `SFTTrainer`. `data_collator` is an [`AnswerCollator`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: LibraProcessor,
        rehearsal: Rehearsal | None = None,
        unspoken: UnspokenNames | None = None,
        **kwargs,
    ) -> None:
        if unspoken is not None:
            unspoken.check_layers(model.config.text_config.num_hidden_layers)
        super().__init__(model=model, processing_class=processing_class, **kwargs)
        self.rehearsal = rehearsal
        self.unspoken = unspoken

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss of the answers, and once a step that of the samples beside them."""
        # These first: the head that is gathered for TRL's loss must stay so until backward, which begins there.
        beside = []
        if self.model.training and self.accelerator.sync_gradients:
            if self.rehearsal is not None:
                beside.append(self._rehearsal_loss(model, self.rehearsal))
            if self.unspoken is not None:
                beside.append(self._unspoken_loss(model, self.unspoken))
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (found[0] + sum(beside), found[1]) if return_outputs else found + sum(beside)

    def _rehearsal_loss(self, model: nn.Module, rehearsal: Rehearsal) -> torch.Tensor:
        step, process, processes = self.state.global_step, self.args.process_index, self.args.world_size
        batch = self._prepare_inputs(rehearsal.of_step(step, process, processes))
        labels = batch["labels"][:, 1:]
        is_vision = labels >= self.processing_class.text_vocab_size
        is_text = (labels >= 0) & ~is_vision
        outputs = self._run_beside(model, rehearsal.as_read(batch, step, process))
        terms = {"rehearsal_text_loss": outputs.text_loss, "rehearsal_vision_loss": outputs.vision_loss}
        self.keep_terms(terms, {"rehearsal_text_loss": is_text.sum(), "rehearsal_vision_loss": is_vision.sum()})
        return rehearsal.weight * outputs.loss * processes

    def _unspoken_loss(self, model: nn.Module, unspoken: UnspokenNames) -> torch.Tensor:
        step, process, processes = self.state.global_step, self.args.process_index, self.args.world_size
        batch = self._prepare_inputs(unspoken.of_step(step, process, processes))
        outputs = self._run_beside(model, batch, output_hidden_states=True)
        distance = states_apart(outputs.hidden_states, batch["labels"], unspoken.layers)
        count = (batch["labels"] >= 0).sum()
        self.keep_terms({"unspoken_loss": outputs.text_loss, "unspoken_distance": distance}, {"unspoken_loss": count})
        return outputs.loss * processes + unspoken.weight * distance

    def _run_beside(self, model: nn.Module, batch: dict[str, torch.Tensor], **kwargs):
        """The model's outputs, whose `loss` is the sum of this process over the number of targets of all processes."""
        total = self.accelerator.gather((batch["labels"][:, 1:] >= 0).sum()).sum()
        return model(**batch, use_cache=False, num_items_in_batch=total, **kwargs)


def describe_trained(model: nn.Module) -> str:
    """
    Args:
        model (`nn.Module`): before its training.

    Returns:
        `str`: how many of its parameters are trained, of the language model and of the vision system.
    """
    counts = {"vision": 0, "language": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["vision" if "vision" in name else "language"] += parameter.numel()
    return f"Training {counts['language']:,} parameters of the language model and {counts['vision']:,} of the vision system."


def main(arguments: list[str] | None = None) -> None:
    """Runs the stage; `arguments` are those of the command line."""
    options = (
        *(SFTArguments, DataArguments, ConversationArguments, RehearsalArguments, UnspokenArguments, AdapterArguments),
        SFTConfig,
    )
    parser = StageParser("sft", options)
    stage, data, conversations, rehearsing, thinking, adapter, args = parser.parse_args_and_config(arguments)
    args.remove_unused_columns = False  # samples are opened when they are read
    args.assistant_only_loss = True
    check_path(stage.model)
    check_global_batch(args, stage.global_batch_size)
    adapter.check_packages(args)
    announce_run(args, "sft")
    processor = LibraProcessor.from_pretrained(stage.model)
    args.max_length = row_length(processor, args.max_length)
    processor.caption_prompt = stage.caption_prompt or processor.caption_prompt
    if data.dataset == "world":
        train_data, eval_data = load_world_conversations(data)
    else:
        say = print if args.process_index == 0 else logger.debug
        train_data = read_conversations(data.dataset, conversations, ConversationCheck(processor, args.max_length), say)
        eval_data = None
    rehearsal = rehearsing.open(data, processor, args.seed)
    unspoken = thinking.open(data, processor, args.seed)
    if (rehearsal or unspoken) is not None and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # several forward passes a step: what one does not use, the other does
    collator = AnswerCollator(processor, args.max_length)
    every = max(1, len(train_data) // CHECKED_SAMPLES)
    check_supervision(collator, [train_data[i] for i in range(0, len(train_data), every)])
    trainer = LibraSFTTrainer(
        model=load_model(stage.model, **adapter.loading_options(args)),
        processing_class=processor,
        rehearsal=rehearsal,
        unspoken=unspoken,
        args=args,
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=eval_data,
        peft_config=adapter.peft_config(),
    )
    if args.process_index == 0:
        print(describe_trained(trainer.model), flush=True)
    run_training(trainer)
    save_result(trainer)  # and the processor


if __name__ == "__main__":
    main()
