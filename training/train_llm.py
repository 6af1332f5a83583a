"""
Stage 0: a small Llama with its tokenizer, trained on the world's text. (At full size a released LLM is used instead.)

    python -m training.train_llm --config training/configs/tiny/llm.yaml
    python -m training.train_llm --config training/configs/tiny/llm.yaml --max_steps 10 --output_dir runs/try
    python -m training.train_llm --config my.yaml --dataset documents.txt

A run goes on from the last checkpoint in `output_dir` by itself. Written there: a plain Llama repo (weights, config,
`tokenizer.json`, `tokenizer.model`), and `metrics.json`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from .run import StageParser, announce_run, run_training
from .text_tokenizer import save_llama_tokenizer, train_sentencepiece
from .world.corpus import END, TextWorld, prompts_with_answers

Documents = Sequence[str] | TextWorld
"""Texts by index."""


@dataclass
class LlmArguments:
    """
    What is trained, on what.

    Args:
        dataset (`str`, *optional*, defaults to `"world"`): `"world"`, or a text file with a document a line.
        train_documents (`int`, *optional*, defaults to 30000): Documents of the world in an epoch.
        eval_documents (`int`, *optional*, defaults to 500): Documents of the world's validation split.
        tokenizer_documents (`int`, *optional*, defaults to 6000): Documents the tokenizer is trained on.
        block_size (`int`, *optional*, defaults to 384): Tokens of a training sequence; documents are packed.
        model_config (`dict`, *optional*): Settings of `LlamaConfig`; `vocab_size` is that of the tokenizer, too.
        eval_prompts (`int`, *optional*, defaults to 200): Questions about lines of text answered at the end.
    """

    dataset: str = field(default="world", metadata={"help": "'world', or a text file with a document a line."})
    train_documents: int = field(default=30_000, metadata={"help": "Documents of the world in an epoch."})
    eval_documents: int = field(default=500, metadata={"help": "Documents of the validation split."})
    tokenizer_documents: int = field(default=6_000, metadata={"help": "Documents the tokenizer is trained on."})
    block_size: int = field(default=384, metadata={"help": "Tokens of a training sequence."})
    model_config: dict = field(default_factory=dict, metadata={"help": "Settings of LlamaConfig."})
    eval_prompts: int = field(default=200, metadata={"help": "Questions answered at the end."})


def read_documents(script: LlmArguments) -> tuple[Documents, Documents]:
    """
    Training and validation documents, each ending in `</s>`.

    Args:
        script ([`LlmArguments`]): Where from. Of a file every 50th document is for validation.

    Raises:
        FileNotFoundError: If the dataset is a file that does not exist.
    """
    if script.dataset == "world":
        return TextWorld("train", script.train_documents), TextWorld("validation", script.eval_documents)
    path = Path(script.dataset)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Give 'world', or a text file with a document a line.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error
    documents = [line + END for line in text.splitlines() if line.strip()]
    return [text for i, text in enumerate(documents) if i % 50], documents[::50]


def tokenizer_lines(documents: Documents, count: int) -> Iterator[str]:
    """The lines of the first `count` documents, without the end token."""
    for index in range(min(count, len(documents))):
        for line in documents[index].replace(END, "").split("\n"):
            if line.strip():
                yield line


def encode_document(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Ids of a document, from `<s>` on.

    A document that begins with a line break is the continuation of an image: it must not begin with a space token.
    """
    if text.startswith("\n"):
        return tokenizer(f"{tokenizer.bos_token}{text}", add_special_tokens=False)["input_ids"]
    return tokenizer(text)["input_ids"]


class PackedText(Dataset):
    """
    Documents one after the other, cut into blocks of equal length.

    Args:
        documents (`Sequence[str]` or [`TextWorld`]): The documents.
        tokenizer (`PreTrainedTokenizerBase`): Makes ids of them.
        block_size (`int`): Tokens of a block.

    Raises:
        ValueError: If the documents do not fill a single block.
    """

    def __init__(self, documents: Documents, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        ids: list[int] = []
        for index in range(len(documents)):
            ids += encode_document(documents[index], tokenizer)
        if len(ids) < block_size:
            raise ValueError(f"{len(documents)} documents have {len(ids)} tokens, less than a block of {block_size}.")
        self.blocks = torch.from_numpy(np.array(ids[: len(ids) // block_size * block_size])).view(-1, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index`: `input_ids` and `labels`, both `(block_size,)`."""
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


@torch.inference_mode()
def answer_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, batch_size: int = 20
) -> dict[str, float]:
    """
    How many questions about a line of text the model answers right, greedily.

    Args:
        model (`LlamaForCausalLM`): The model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, padding on the left.
        count (`int`): Number of scenes of the validation split, a question of each.
        batch_size (`int`, *optional*, defaults to 20): Questions at a time.

    Returns:
        `dict[str, float]`: Accuracy in [0, 1] by kind of question, and `"all"`.
    """
    cases = prompts_with_answers("validation", count)
    right: dict[str, list[bool]] = {}
    for start in range(0, count, batch_size):
        batch = cases[start : start + batch_size]
        inputs = tokenizer([prompt for prompt, _ in batch], padding=True, return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question), answer in zip(batch, answers):
            right.setdefault(question.kind, []).append(answer.strip() == question.answer)
    accuracy = {kind: sum(values) / len(values) for kind, values in sorted(right.items())}
    return accuracy | {"all": sum(map(sum, right.values())) / count}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """
    Train the tokenizer and the model, save and measure them.

    Args:
        arguments (`list[str]`, *optional*): Command line; by default that of the process.

    Returns:
        `dict[str, float]`: `eval_loss` in nats a token, and accuracies on the world's questions.
    """
    script, args = StageParser("llm", (LlmArguments, TrainingArguments)).parse_args_and_config(arguments)
    announce_run(args, "llm")
    set_seed(args.seed)
    train, validation = read_documents(script)
    model_config = {"max_position_embeddings": 512, **script.model_config}
    folder = Path(args.output_dir)
    sentencepiece_model = train_sentencepiece(
        tokenizer_lines(train, script.tokenizer_documents), model_config["vocab_size"]
    )
    tokenizer = save_llama_tokenizer(sentencepiece_model, folder, model_config["max_position_embeddings"])
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**model_config, **special))
    print(f"Language model: {model.num_parameters():,} parameters", flush=True)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=PackedText(train, tokenizer, script.block_size),
        eval_dataset=PackedText(validation, tokenizer, script.block_size),
    )
    run_training(trainer)
    trainer.save_model()
    metrics = {"eval_loss": round(trainer.evaluate()["eval_loss"], 4)}
    if script.dataset == "world" and script.eval_prompts:
        accuracy = answer_accuracy(model.eval(), tokenizer, script.eval_prompts)
        metrics |= {f"answers_{kind}": round(value, 4) for kind, value in accuracy.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2), flush=True)
    return metrics


if __name__ == "__main__":
    main()
