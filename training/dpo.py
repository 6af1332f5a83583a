"""Preference tuning with TRL's `DPOTrainer`: of two answers about an image, the better one becomes more likely.

Launch, at tiny size:

    python -m training.dpo --config training/configs/tiny/dpo.yaml

with preferences of one's own (see [`~training.preferences`]), and LoRA (see [`~training.adapters`]):

    python -m training.dpo --config training/configs/dpo_lora_11b.yaml --model LIBRA --dataset MY.json

The log compares with the model before (`rewards/...`, in units of `beta`): `rewards/accuracies` is the share of pairs in
which the chosen answer gained more than the rejected one, `rewards/margins` by how much; `eval_on_start` shows the
beginning, where both are 0. What is compared are the log-probabilities of the last answer's tokens, which are text: the
image is part of the question. Every field of [`DPOArguments`], [`~training.data.DataArguments`],
[`~training.conversations.ConversationArguments`], [`~training.adapters.AdapterArguments`] and TRL's `DPOConfig` is a key
of the YAML file and a command line flag; flags win.
"""

from dataclasses import dataclass, field

from accelerate.utils import DistributedType
from trl import DPOConfig, DPOTrainer

from libra_cli.loading import check_path, load_model
from processing.processing_libra import LibraProcessor

from .adapters import AdapterArguments
from .answers import ConversationCheck, check_supervision, row_length
from .conversations import ConversationArguments
from .data import DataArguments, load_world_preferences
from .device_tokenization import DeviceTokenization
from .preferences import PreferenceCollator, conversations, read_preferences
from .run import StageParser, announce_run, check_global_batch, run_training, save_result
from .sft import CHECKED_SAMPLES, describe_trained


@dataclass
class DPOArguments:
    """
    What is tuned.

    Args:
        model (`str`): folder or Hub repo of a tuned Libra, with its processor. What it is now is what it is compared with.
        global_batch_size (`int`, *optional*):
            Pairs of all devices in a step. The run stops at once if the settings of batch and devices make another.
    """

    model: str = field(metadata={"help": "Folder or Hub repo of a tuned Libra, with its processor."})
    global_batch_size: int | None = field(default=None, metadata={"help": "Pairs of all devices in a step, checked."})


class LibraDPOTrainer(DeviceTokenization, DPOTrainer):
    """
    TRL's trainer that tokenizes images on the device, in batches.

    Args:
        model ([`LibraForCausalLM`]): is tuned.
        processing_class ([`LibraProcessor`]): its image tokenizer is moved to the device of the model.
        kwargs: as in TRL's `DPOTrainer`. `data_collator` is a [`PreferenceCollator`]; `ref_model` is needed unless an
            adapter is trained, as TRL would look for the model among transformers' own.

    Raises:
        ValueError: under FSDP and DeepSpeed, which have not been tried.
    """

    def __init__(self, model, processing_class: LibraProcessor, **kwargs):
        engine = kwargs["args"].distributed_state.distributed_type
        if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(f"Preference tuning under {engine.value} has not been checked. Use one device, or DDP.")
        super().__init__(model, processing_class, **kwargs)


def main(arguments: list[str] | None = None) -> None:
    """Runs the stage; `arguments` are those of the command line."""
    parser = StageParser("dpo", (DPOArguments, DataArguments, ConversationArguments, AdapterArguments, DPOConfig))
    stage, data, options, adapter, args = parser.parse_args_and_config(arguments)
    args.remove_unused_columns = False  # samples are opened when they are read
    check_path(stage.model)
    check_global_batch(args, stage.global_batch_size)
    adapter.check_packages(args)
    announce_run(args, "dpo")
    processor = LibraProcessor.from_pretrained(stage.model)
    args.max_length = row_length(processor, args.max_length)
    if data.dataset == "world":
        train_data, eval_data = load_world_preferences(data)
    else:
        train_data, eval_data = read_preferences(data.dataset, options, ConversationCheck(processor)), None
    collator = PreferenceCollator(processor, args.max_length)
    some = [train_data[i] for i in range(0, len(train_data), max(1, len(train_data) // CHECKED_SAMPLES))]
    for side in ("chosen", "rejected"):
        check_supervision(collator.answers, conversations(some, side))
    loading = adapter.loading_options(args)
    trainer = LibraDPOTrainer(
        model=load_model(stage.model, **loading),
        ref_model=None if adapter.lora_target else load_model(stage.model, **loading),  # else: without the adapter
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
