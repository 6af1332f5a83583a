"""Where answers look (Figure 4), and how diverse that is (Figure 7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from ..reconstruction import clip_to_unit
from .panels import STYLES, Curve, Panel, place_curves, place_panels, save_figure

DISTANCE, WEIGHT = "total variation distance", "attention weight"
"""Units of the curves and of the overlays."""

OVERLAYS_IN_A_ROW = 8


@dataclass(frozen=True)
class Look:
    """
    An answer and where it looked.

    Args:
        image (`PIL.Image.Image`): as the model sees it, square.
        tokens (`list` of `str`): of the answer, without the end of the sequence.
        maps (`torch.FloatTensor` of shape `(tokens, layers, heads, patches)`): see `LibraForCausalLM.attend_to_image`.
        cross_layer (`torch.FloatTensor` of shape `(layers - 1,)`): difference of neighbouring layers, mean of the tokens.
        inner_layer (`torch.FloatTensor` of shape `(layers,)`): difference of the heads of a layer, likewise.
    """

    image: Image.Image
    tokens: list[str]
    maps: torch.Tensor
    cross_layer: torch.Tensor
    inner_layer: torch.Tensor

    @property
    def answer(self) -> str:
        """`str`: the text of the tokens."""
        return "".join(self.tokens).strip()


@torch.inference_mode()
def look_at_image(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str | None = None,
    answer: str | None = None,
    max_new_tokens: int = 32,
) -> Look:
    """
    Lets a model answer a question about an image, greedily, and collects the attention of the answer on it.

    Args:
        model ([`LibraForCausalLM`]): answers.
        processor ([`LibraProcessor`]): of the same repository.
        image (`PIL.Image.Image`): of any size.
        question (`str`, *optional*, defaults to `processor.caption_prompt`):
            Asked in the chat template. If there is neither, the image is captioned as in pretraining.
        answer (`str`, *optional*): this answer instead of the model's own, so that models are compared on one.
        max_new_tokens (`int`, *optional*, defaults to 32): most tokens of the model's own.

    Returns:
        [`Look`]

    Raises:
        ValueError: if the model answers nothing.
    """
    question = question or processor.caption_prompt
    if question is None:
        inputs = processor(images=image, return_tensors="pt")
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
    inputs = inputs.to(model.device)
    if answer is None:
        written = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        ids = written[0, inputs["input_ids"].shape[1] :]
    else:
        ids = answer_ids(processor, answer, question)
    ids = ids[ids != processor.tokenizer.eos_token_id]
    if len(ids) == 0:
        raise ValueError("The model answered nothing, so there is no attention of an answer; try another question.")
    maps = model.attend_to_image(**inputs, answer_ids=ids).cpu()
    pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    return Look(
        image=processor.image_processor.postprocess(clip_to_unit(pixels))[0],
        tokens=split_text(processor, ids.tolist()),
        maps=maps,
        cross_layer=model.cross_layer_difference(maps).mean(dim=0),
        inner_layer=model.inner_layer_difference(maps).mean(dim=0),
    )


def answer_ids(processor: Any, answer: str, question: str | None) -> torch.Tensor:
    """
    An answer as the model is trained to write it, to compare models on it.

    Tokenizers of the Llama family begin a text with a space: after a
    question there is one, after an image, as captions stand in pretraining, there is none.

    Args:
        processor ([`LibraProcessor`]): has the tokenizer.
        answer (`str`): it.
        question (`str`, *optional*): what it answers; None for a caption as in pretraining.

    Returns:
        `torch.LongTensor` of shape `(tokens,)`.
    """
    if question is not None:
        return processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    before, whole = (processor.tokenizer("\n" + text, add_special_tokens=False)["input_ids"] for text in ("", answer))
    return torch.tensor(whole[len(before) :])


def split_text(processor: Any, ids: Sequence[int]) -> list[str]:
    """What each id adds to the text of those before it."""
    texts = [processor.decode(list(ids[:end]), skip_special_tokens=True) for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def overlays(look: Look, grid: int) -> list[Panel]:
    """
    The picture of each layer: attention on each patch, mean of the answer's tokens and of the heads.

    Args:
        look ([`Look`]): what to show.
        grid (`int`): patches along one side of the image.

    Returns:
        `list` of [`Panel`]: the image, then one for each layer.
    """
    pictures = look.maps.mean(dim=(0, 2)).unflatten(-1, (grid, grid))  # (layers, grid, grid)
    shown = [Panel(f"layer {i}", look.image, picture.numpy(), WEIGHT) for i, picture in enumerate(pictures, start=1)]
    return [Panel(f"“{look.answer}”", look.image), *shown]


def head_rows(look: Look, grid: int) -> list[tuple[str, list[Panel]]]:
    """The picture of each head, mean of the answer's tokens, a row a layer: for [`~panels.draw_panels`]."""
    pictures = look.maps.mean(dim=0).unflatten(-1, (grid, grid))  # (layers, heads, grid, grid)
    return [
        (f"layer {i}", [Panel(f"head {j}", look.image, one.numpy(), WEIGHT) for j, one in enumerate(of_layer, start=1)])
        for i, of_layer in enumerate(pictures, start=1)
    ]


def draw_attention(looks: dict[str, Look], grids: dict[str, int], path: str | Path, title: str = "") -> None:
    """
    Draws the overlays of one or several models, and both curves of Figure 7 below them.

    Args:
        looks (`dict` of [`Look`]): by the models' labels; at least one and at most as many as there are line styles.
        grids (`dict` of `int`): patches along one side of the image, by the same labels.
        path (`str` or `Path`): the PNG or SVG file to write.
        title (`str`, *optional*, defaults to `""`): above all.

    Raises:
        ValueError: for a wrong number of models.
    """
    if not 1 <= len(looks) <= len(STYLES):
        raise ValueError(f"There are {len(looks)} models; a figure has 1 to {len(STYLES)}.")
    rows = []
    for label, look in looks.items():
        panels = overlays(look, grids[label])
        for start in range(0, len(panels), OVERLAYS_IN_A_ROW + 1):
            rows.append((label, panels[start : start + OVERLAYS_IN_A_ROW + 1]))
    columns = max(len(panels) for _, panels in rows)
    width = max(1.7 * columns + 0.3, 7.0)
    figure: Any = Figure(figsize=(width, 1.7 * len(rows) + 3.0), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.7 * len(rows), 2.7))
    place_panels(top, rows, columns)
    top.suptitle(f"{title}\nattention on each patch, mean of heads and answer tokens".strip(), fontsize="small")
    draw_curves(
        bottom,
        [Curve(label, look.cross_layer.tolist()) for label, look in looks.items()],
        [Curve(label, look.inner_layer.tolist()) for label, look in looks.items()],
    )
    save_figure(figure, path)


def draw_curves(figure: Any, cross_layer: Sequence[Curve], inner_layer: Sequence[Curve]) -> None:
    """Puts the two curves of Figure 7 into a figure or a part of one."""
    left, right = figure.subplots(1, 2)
    place_curves(left, cross_layer, "cross-layer difference", "layer, and the next one", DISTANCE)
    place_curves(right, inner_layer, "inner-layer difference (between heads)", "layer", DISTANCE)
