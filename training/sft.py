"""Stage 2, instruction tuning (Section 4.1): answers to questions about images, with TRL's `SFTTrainer`.

Launch, at tiny size:

    python -m training.sft --config training/configs/tiny/sft.yaml

on a dataset of one's own (columns `messages` and `images`, read by `datasets.load_dataset`), on several GPUs:

    accelerate launch -m training.sft --config my_sft.yaml --dataset path/or/repo

Everything but the image tokenizer is trained, and only answers are supervised: `assistant_only_loss` with the
`{% generation %}` marks of Libra's chat template. Every field of [`SFTArguments`], [`~training.data.DataArguments`] and
TRL's `SFTConfig` is a key of the YAML file and a command line flag; flags win. A run goes on from the last checkpoint
in `output_dir` by itself.
"""

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from modeling_libra import LibraForCausalLM
from processing.processing_libra import LibraProcessor

from .data import DataArguments, load_conversations
from .run import StageParser, announce_run, run_training


@dataclass
class SFTArguments:
    """
    What is tuned.

    Args:
        model (`str`): folder of a pretrained Libra, with its processor.
        caption_prompt (`str`, *optional*): what the tuned model is asked for a caption when a user asks nothing; the
            image-to-text pipeline and `libra caption` read it from the saved processor.
    """

    model: str = field(metadata={"help": "Folder of a pretrained Libra, with its processor."})
    caption_prompt: str | None = field(default=None, metadata={"help": "What the tuned model is asked for a caption."})


def main(arguments: list[str] | None = None) -> None:
    """Runs the stage; `arguments` are those of the command line."""
    parser = StageParser("sft", (SFTArguments, DataArguments, SFTConfig))
    stage, data, args = parser.parse_args_and_config(arguments)
    args.remove_unused_columns = False  # the columns of the world appear when a sample is drawn
    args.assistant_only_loss = True
    announce_run(args, "sft")
    train_data, eval_data = load_conversations(data)
    processor = LibraProcessor.from_pretrained(stage.model)
    processor.caption_prompt = stage.caption_prompt
    processor.image_tokenizer.to(args.device).eval()
    trainer = SFTTrainer(
        model=LibraForCausalLM.from_pretrained(stage.model),
        processing_class=processor,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
    )
    run_training(trainer)
    trainer.save_model()
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
