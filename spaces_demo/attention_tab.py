"""The fourth tab: where the words of an answer look."""

from html import escape
from typing import Any

import gradio as gr
from chat_tab import EXAMPLES
from conversation import SHORT_ANSWER
from libra_model import gpu, load
from looking import Look, look
from pictures import curve, figures, heat, picture
from PIL import Image
from tokenizer_tab import image_examples, image_input, read_pixels
from uploads import VisitorError
from wording import SECTION

EXPLANATION = f"""
### Look inside

Before it writes a word, each layer of the model looks back over everything so far, the image included. Here you see for
every word how strongly each layer looks at each patch: bright orange is much, dark is nothing. The curves below tell how
much that changes from layer to layer, and how much the heads of a layer (each looks in its own way) disagree.
[Figures 4 and 7, in section 4 of the paper]({SECTION.format("S4")})
"""

FIRST_IMAGE = str(EXAMPLES / "airplane.png")
FIRST_QUESTION = f"What is in the image?\n{SHORT_ANSWER}"
WHOLE_ANSWER = "whole answer"
MAX_QUESTION = 500
MOST_LAYERS = 12
"""Most layers that are shown; of a deeper model, so many at even distances."""

KEPT = 3600
"""Seconds a visitor's maps are kept."""


def inspect(image: str | None, question: str) -> tuple[Any, str, Any, str, str]:
    """
    Asks about an image and shows where the answer looks.

    Args:
        image (`str`, *optional*): path of the image.
        question (`str`): the question.

    Returns:
        `tuple`: the numbers, to be kept for [`show_word`]; HTML of the answer; the choice of words; HTML of the maps; HTML
        of the curves.
    """
    try:
        if len(question) > MAX_QUESTION:
            raise VisitorError(f"The question has {len(question)} characters. Please keep to {MAX_QUESTION}.")
        seen = look(image, question)
        pixels = read_pixels(image)
    except VisitorError as error:
        raise gr.Error(str(error), print_exception=False) from error
    image_processor = load().processor.image_processor
    shown = image_processor.postprocess(image_processor.denormalize(pixels))[0]
    kept = (seen, shown)
    choices = [(WHOLE_ANSWER, -1), *((word, k) for k, word in enumerate(seen.words))]
    said = f"<p>The answer: <strong>{escape(' '.join(seen.words))}</strong></p>"
    return kept, said, gr.update(choices=choices, value=-1), show_word(kept, -1), show_curves(seen)


def show_word(kept: tuple[Look, Image.Image] | None, word: int | None) -> str:
    """
    The maps of one word, a picture for each layer.

    Args:
        kept (`tuple`, *optional*): the numbers and the image, as [`inspect`] returns them.
        word (`int`, *optional*): which word of the answer; -1, or none, for the mean of all.

    Returns:
        `str`: HTML.
    """
    if kept is None:
        return ""
    seen, image = kept
    is_whole = word is None or not 0 <= word < len(seen.words)
    maps = seen.maps.mean(axis=0) if is_whole or word is None else seen.maps[word]  # (layers, patches)
    name = WHOLE_ANSWER if is_whole or word is None else seen.words[word]
    count = min(len(maps), MOST_LAYERS)
    layers = [round(k * (len(maps) - 1) / max(1, count - 1)) for k in range(count)]
    pictures = []
    for layer in layers:
        share = maps[layer].sum()
        alt = f"Layer {layer + 1}, {name}: {share:.0%} of the attention is on the image"
        pictures.append((picture(heat(image, maps[layer], maps[layer].max()), alt), f"Layer {layer + 1}: {share:.0%}"))
    note = "<p>Under each picture: how much of the layer's attention is on the image; the rest is on text. Each "
    note += "picture has a scale of its own.</p>"
    return figures(pictures, f"Attention of {name} on the image, by layer", small=True) + note


def show_curves(seen: Look) -> str:
    """
    The two curves of diversity.

    Args:
        seen ([`Look`]): the numbers.

    Returns:
        `str`: HTML.
    """
    steps = [f"{k + 1}-{k + 2}" for k in range(len(seen.cross_layer))]
    layers = [str(k + 1) for k in range(len(seen.inner_layer))]
    cross = curve(seen.cross_layer, steps, "layers", "How much attention moves from layer to layer.")
    inner = curve(seen.inner_layer, layers, "layer", "How much the heads of each layer differ.")
    return figures(
        [
            (cross, "From layer to layer: 0 if both look at the same patches, 1 if at entirely different ones"),
            (inner, "Between the heads of a layer: 0 if all look alike, 1 if at entirely different patches"),
        ],
        "Diversity of attention for this question",
    )


def build_attention() -> None:
    """Puts the look at attention into the tab that is open."""
    kept, said, words, maps, curves = inspect(FIRST_IMAGE, FIRST_QUESTION)
    gr.Markdown(EXPLANATION)
    state = gr.State(kept, time_to_live=KEPT)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            image = image_input("attention-image", value=FIRST_IMAGE)
            image_examples(image)
            question = gr.Textbox(FIRST_QUESTION, label="Question", lines=2, max_length=MAX_QUESTION)
            start = gr.Button("Look", variant="primary")
        with gr.Column(scale=2, min_width=260):
            answer = gr.HTML(said, elem_id="attention-answer")
            choice = gr.Radio(words["choices"], value=-1, label="Show where this looks", elem_id="attention-words")
            shown = gr.HTML(maps, elem_id="attention-maps")
            curve_area = gr.HTML(curves, elem_id="attention-curves")
    start.click(
        gpu(inspect), [image, question], [state, answer, choice, shown, curve_area], api_name="look",
        show_progress="minimal",
    )  # fmt: skip
    choice.input(show_word, [state, choice], shown, api_visibility="undocumented", show_progress="hidden")
