"""The third tab: images the model writes."""

from collections.abc import Iterator

import gradio as gr
import torch
from chat_tab import EXAMPLES
from conversation import check_text
from drawing import paint
from libra_model import gpu, load
from pictures import figures, picture
from tokenizer_tab import image_examples, image_input, read_pixels
from uploads import VisitorError
from wording import SECTION

EXPLANATION = f"""
### Imagine

The model writes images as it writes text: one patch after the other, row by row, each from everything before it. Give it
the first rows of an image and watch it go on, or only a caption. Hatched patches are not written yet.
[Section 3.4 of the paper]({SECTION.format("S3.SS4")})
"""

FIRST_IMAGE = str(EXAMPLES / "strawberry.png")
FIRST_CAPTION = "strawberry"
MAX_SAMPLES = 4
MAX_CAPTION = 200
TEMPERATURE = 0.2
"""At first: things as they were learned; with more, images are freer and soon without form."""


def complete(image: str | None, rows: int = 4, caption: str = "", temperature: float = TEMPERATURE) -> Iterator[str]:
    """
    Completes an image from its first rows.

    Args:
        image (`str`, *optional*): path of the image.
        rows (`int`, *optional*, defaults to 4): rows of patches that are given.
        caption (`str`, *optional*): text before the image.
        temperature (`float`, *optional*, defaults to 0.2): 0 for the likeliest codes; more for variety.

    Yields:
        `str`: HTML with the image so far, again at every row.
    """
    grid = load().processor.image_grid
    rows = min(max(int(rows), 1), grid - 1)
    try:
        _check_caption(caption)
        pixels = read_pixels(image)
    except VisitorError as error:
        raise gr.Error(str(error), print_exception=False) from error
    image_processor = load().processor.image_processor
    original = image_processor.postprocess(image_processor.denormalize(pixels))[0]
    whole = (picture(original, "The whole image"), "The image")
    for images, done in paint(caption, pixels, rows, 1, temperature):
        told = f"{rows} of {grid} rows given, {done - rows} written"
        yield figures([whole, (picture(images[0], f"The image as completed so far: {told}"), told)], "Completion")


def draw(caption: str, samples: int = 2, temperature: float = TEMPERATURE) -> Iterator[str]:
    """
    Draws images of a caption.

    Args:
        caption (`str`): what to draw.
        samples (`int`, *optional*, defaults to 2): how many.
        temperature (`float`, *optional*, defaults to 0.2): 0 for the likeliest codes; more for variety.

    Yields:
        `str`: HTML with the images so far, again at every row.
    """
    samples = min(max(int(samples), 1), MAX_SAMPLES)
    try:
        if not caption.strip():
            raise VisitorError("Type what to draw.")
        _check_caption(caption)
    except VisitorError as error:
        raise gr.Error(str(error), print_exception=False) from error
    grid = load().processor.image_grid
    for images, done in paint(caption.strip(), None, 0, samples, temperature):
        told = f"{done} of {grid} rows written"
        drawn = [(picture(image, f"Drawing of {caption}"), f"Number {k + 1}") for k, image in enumerate(images)]
        yield figures(drawn, "Drawings") + f"<p>{told}</p>"


def _check_caption(caption):
    check_text(caption)
    if len(caption) > MAX_CAPTION:
        raise VisitorError(f"The caption has {len(caption)} characters. Please keep to {MAX_CAPTION}.")


def worked_example() -> str:
    """A completion, computed when this is called: the HTML of its end."""
    torch.manual_seed(0)
    *_, last = complete(FIRST_IMAGE, load().processor.image_grid * 3 // 4, FIRST_CAPTION)
    return last


def build_imagine() -> None:
    """Puts completion and drawing into the tab that is open."""
    gr.Markdown(EXPLANATION)
    with gr.Tab("Complete an image"):
        _build_complete()
    with gr.Tab("Draw a caption"):
        _build_draw()


def _build_complete():
    grid = load().processor.image_grid
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            image = image_input("imagine-image", value=FIRST_IMAGE)
            image_examples(image)
            caption = gr.Textbox(FIRST_CAPTION, label="Caption", info="May be empty.", max_length=MAX_CAPTION)
            rows = gr.Slider(1, grid - 1, grid * 3 // 4, step=1, label="Rows that are given", info=f"Of {grid}.")
            temperature = _temperature()
            start, stop = _buttons("Complete")
        with gr.Column(scale=2, min_width=260):
            shown = gr.HTML(worked_example(), elem_id="completed")
    running = start.click(
        gpu(complete), [image, rows, caption, temperature], shown, api_name="complete", show_progress="minimal"
    )
    stop.click(None, cancels=running)


def _build_draw():
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            caption = gr.Textbox("horse", label="Caption", elem_id="draw-caption", max_length=MAX_CAPTION)
            samples = gr.Slider(1, MAX_SAMPLES, 2, step=1, label="How many")
            temperature = _temperature()
            start, stop = _buttons("Draw")
        with gr.Column(scale=2, min_width=260):
            shown = gr.HTML("<p>What it draws appears here.</p>", elem_id="drawn")
    running = gr.on(
        [start.click, caption.submit], gpu(draw), [caption, samples, temperature], shown, api_name="draw",
        show_progress="minimal",
    )  # fmt: skip
    stop.click(None, cancels=running)


def _temperature():
    return gr.Slider(0, 2, TEMPERATURE, step=0.1, label="Temperature", info="0: the likeliest patches. More: variety.")


def _buttons(label):
    with gr.Row():
        return gr.Button(label, variant="primary", min_width=80), gr.Button("Stop", min_width=80)
