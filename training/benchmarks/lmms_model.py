"""Libra as a model of lmms-eval (0.7.3), found by its name through an entry point:

    lmms_eval --model libra --model_args pretrained=DIR --tasks libra_gqa --include_path training/benchmarks/tasks

`libra evaluate --tasks ...` is the same, resumes, and sets the numbers in a table.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from libra_cli.loading import load_libra, to_accelerator

MAX_NEW_TOKENS = 128
"""Longest answer, in tokens, of tasks that do not say."""


class LibraLmms(lmms):
    """
    Answers the chat requests of lmms-eval greedily, in batches, whatever settings of sampling a task has.

    Args:
        pretrained (`str` or `Path`): folder or Hub repo of a Libra.
        batch_size (`int` or `str`, *optional*, defaults to 8): requests at a time.
        device (`str`, *optional*): as torch has it; by default the accelerator, if there is one.
        dtype (`str`, *optional*): of the weights, such as `"bfloat16"`; by default that of the repository.
        answers (`str` or `Path`, *optional*): JSONL file that keeps each answer as soon as it is there; what is in it is
            not asked again.
        max_batch_size (*optional*): lmms-eval passes it; there is no automatic batch size.

    Raises:
        ValueError: if the model cannot be loaded, or the file has answers of another model.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | Path,
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str | None = None,
        answers: str | Path | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)
        self.answers = AnswerFile(answers, describe_weights(pretrained)) if answers else None
        model, processor = load_libra(pretrained, **({"dtype": dtype} if dtype else {}))
        if device is None:
            model, processor = to_accelerator(model, processor)
        else:
            model.to(device)
            processor.image_tokenizer.to(device)
        self.model, self.processor = model, processor

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answers of requests.

        Args:
            requests (`list` of `Instance`): each with the arguments (context, doc_to_messages, generation settings, number
                of the sample, task, split).

        Returns:
            `list` of `str`: an answer a request, cut off before the texts at which its task stops.
        """
        keys = [_key(request.args) for request in requests]
        found: dict[str, str] = dict(self.answers.read()) if self.answers else {}
        todo = [(key, request) for key, request in zip(keys, requests) if key not in found]
        with tqdm(total=len(requests), initial=len(requests) - len(todo), desc="Answers") as progress:
            for batch in _batches(todo, self.batch_size):
                texts = self._answer([request.args for _, request in batch])
                new = {key: text for (key, _), text in zip(batch, texts, strict=True)}
                found |= new
                if self.answers:
                    self.answers.add(new)
                progress.update(len(batch))
        return [found[key] for key in keys]

    @torch.inference_mode()
    def _answer(self, requests: Sequence[tuple]) -> list[str]:
        """Answers of requests with the same settings."""
        chats = [
            _messages(to_messages(self.task_dict[task][split][number]))
            for _, to_messages, _, number, task, split in requests
        ]
        settings = requests[0][2]
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
        ).to(self.model.device)
        written = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=settings.get("max_new_tokens", MAX_NEW_TOKENS),
        )
        texts = self.processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_cut(text, settings.get("until", ())) for text in texts]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there: every benchmark of the paper is answered in text."""
        raise NotImplementedError(
            "Libra answers tasks with output_type generate_until; this one compares likelihoods (output_type "
            "loglikelihood or multiple_choice). Choose the variant of the task that generates."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there: no benchmark of the paper has several rounds."""
        raise NotImplementedError(
            "Libra answers tasks with output_type generate_until; this one has several rounds (generate_until_multi_round)."
        )


def describe_weights(pretrained: str | Path) -> str:
    """What tells a model from others, and from itself before it was trained further: its name, and the age of its files."""
    files = [*Path(pretrained).rglob("*.safetensors")] if Path(pretrained).is_dir() else []
    if not files:
        return str(pretrained)
    newest = datetime.fromtimestamp(max(file.stat().st_mtime for file in files))
    return f"{pretrained}, weights of {newest.isoformat(sep=' ')}"


class AnswerFile:
    """
    Answers that survive the end of their process: a line of JSON each, after one that names the model.

    Args:
        path (`str` or `Path`): the file; begun if it is not there.
        model (`str`): whose answers these are, as [`describe_weights`] says it.

    Raises:
        ValueError: if the file is of another model.
    """

    def __init__(self, path: str | Path, model: str) -> None:
        self.path = Path(path)
        if not self.path.exists():
            self.path.write_text(json.dumps({"model": model}) + "\n", encoding="utf-8")
        with self.path.open(encoding="utf-8") as file:
            of = json.loads(file.readline() or "{}").get("model")
        if of != model:
            raise ValueError(f"{path} has answers of {of!r}, not of {model!r}. Name another --output, or delete it.")

    def read(self) -> Iterator[tuple[str, str]]:
        """Key and text of each answer. A last line that was cut off is dropped from the file."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            self.path.write_bytes(b"".join(lines[:-1]))
            lines.pop()
        for line in lines[1:]:
            row = json.loads(line)
            yield row["key"], row["answer"]

    def add(self, answers: dict[str, str]) -> None:
        """Appends answers, by key."""
        rows = [json.dumps({"key": key, "answer": text}, ensure_ascii=False) for key, text in answers.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(row + "\n" for row in rows))


def _key(request: tuple) -> str:
    """What tells a request from all others: changed prompts and settings are asked again."""
    context, _, settings, number, task, split = request
    return json.dumps([task, split, number, context, settings], sort_keys=True, ensure_ascii=False)


def _batches(requests: Iterable[tuple[str, Instance]], size: int) -> Iterator[list[tuple[str, Instance]]]:
    """Neighbours of the same settings, at most `size` of them: those of all tasks come in one list."""
    for _, same in groupby(requests, key=lambda keyed: keyed[1].args[2]):
        while batch := list(islice(same, size)):
            yield batch


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of lmms-eval, whose images are called `url` whatever they are, as the processor takes them."""
    found = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                parts.append({"type": "image", "image": part["url"]})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise ValueError(f"Libra reads images and text; this task has a part of type {part['type']!r}.")
        found.append({"role": message["role"], "content": parts})
    return found


def _cut(text: str, ends: str | Sequence[str]) -> str:
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()
