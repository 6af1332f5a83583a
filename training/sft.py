"""Stage 2, instruction tuning (Section 4.1): answers to questions about images, with TRL's `SFTTrainer`.

Launch, at tiny size:

    python -m training.sft --config training/configs/tiny/sft.yaml

with LLaVA's json as it is published, or any dataset with messages and images (see [`~training.conversations`]):

    accelerate launch --config_file training/configs/accelerate/fsdp2.yaml -m training.sft \\
        --config training/configs/sft_11b.yaml --model LIBRA --dataset llava_v1_5_mix665k.json --image_folder IMAGES \\
        --gradient_accumulation_steps 8

on one GPU, with LoRA or QLoRA (see [`~training.adapters`]):

    python -m training.sft --config training/configs/sft_qlora_11b.yaml --model LIBRA --dataset MY.json

Everything but the image tokenizer is trained, or the adapter; only answers are supervised (see [`~training.answers`]).
Every field of [`SFTArguments`], [`~training.data.DataArguments`], [`~training.conversations.ConversationArguments`],
[`~training.adapters.AdapterArguments`] and TRL's `SFTConfig` is a key of the YAML file and a command line flag; flags
win. A run goes on from the last checkpoint in `output_dir` by itself.
"""

import logging
from dataclasses import dataclass, field

from torch import nn
from trl import SFTConfig, SFTTrainer

from libra_cli.loading import check_path, load_model
from processing.processing_libra import LibraProcessor

from .adapters import AdapterArguments
from .answers import AnswerCollator, ConversationCheck, check_supervision, row_length
from .conversations import ConversationArguments, read_conversations
from .data import DataArguments, load_world_conversations
from .device_tokenization import DeviceTokenization
from .run import StageParser, announce_run, check_global_batch, run_training, save_result

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


class LibraSFTTrainer(DeviceTokenization, SFTTrainer):
    """
    TRL's trainer that tokenizes images on the device, in batches.

    Args:
        model ([`LibraForCausalLM`]): is tuned.
        processing_class ([`LibraProcessor`]): its image tokenizer is moved to the device of the model.
        kwargs: as in TRL's `SFTTrainer`. `data_collator` is an [`AnswerCollator`].
    """


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
    parser = StageParser("sft", (SFTArguments, DataArguments, ConversationArguments, AdapterArguments, SFTConfig))
    stage, data, conversations, adapter, args = parser.parse_args_and_config(arguments)
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
    collator = AnswerCollator(processor, args.max_length)
    every = max(1, len(train_data) // CHECKED_SAMPLES)
    check_supervision(collator, [train_data[i] for i in range(0, len(train_data), every)])
    trainer = LibraSFTTrainer(
        model=load_model(stage.model, **adapter.loading_options(args)),
        processing_class=processor,
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
