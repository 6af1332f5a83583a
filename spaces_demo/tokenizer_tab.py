"""The second tab: what the image tokenizer keeps of an image."""

from functools import partial
from pathlib import Path

import gradio as gr
import torch
from chat_tab import ALT_TEXTS, EXAMPLES
from gradio.data_classes import ImageData
from libra_model import TURNS, gpu, load
from pictures import code_map, figures, hide_patches, picture
from uploads import VisitorError, open_image
from wording import SECTION

EXPLANATION = f"""
### What the tokenizer sees

Before the model sees an image, the **image tokenizer** cuts it into patches and gives each patch two numbers, one from each
of two lists of 512. The numbers are like words: the model reads them and can write them. Below is what they keep of the
image, painted back from the numbers alone. Hide some patches and see which numbers change.
[Section 3.1 of the paper]({SECTION.format("S3.SS1")})
"""

FIRST_IMAGE = str(EXAMPLES / "horse.png")


def tokenize(image: str | None, hidden: int = 0) -> str:
    """
    Shows what the image tokenizer makes of an image.

    Args:
        image (`str`, *optional*): path of the image.
        hidden (`int`, *optional*, defaults to 0): how many patches to hide from it, always in the same random order.

    Returns:
        `str`: HTML with what goes in, what comes back, and the two maps of codes.
    """
    try:
        pixels = read_pixels(image)
    except VisitorError as error:
        raise gr.Error(str(error), print_exception=False) from error
    processor = load().processor
    tokenizer, grid = processor.image_tokenizer, processor.image_grid
    mask = torch.zeros(grid**2, dtype=torch.bool)
    mask[torch.randperm(grid**2, generator=torch.Generator().manual_seed(0))[: int(hidden)]] = True
    masked = pixels.masked_fill(_per_pixel(mask, pixels), 0)  # 0 is the mean colour
    with TURNS:
        codes = tokenizer.encode(torch.cat([pixels, masked])).codes.cpu()  # (2, patches, 2)
        decoded = tokenizer.decode(codes[1:])
    shown = processor.image_processor.postprocess(processor.image_processor.denormalize(pixels))[0]
    restored = processor.image_processor.postprocess(decoded)[0]
    changed = int((codes[0] != codes[1]).any(dim=1)[~mask].sum())
    goes_in = "What goes in" if not mask.any() else f"What goes in, {int(mask.sum())} of {grid**2} patches hidden"
    comes_back = "Painted back from the numbers"
    if mask.any():
        comes_back += f". {changed} of the {int((~mask).sum())} visible patches got other numbers than before"
    size = processor.codebook_size
    maps = [
        (code_map(codes[1, :, k].tolist(), size, f"Map of the {name} codes"), f"The {name} number of each patch")
        for k, name in enumerate(["first", "second"])
    ]
    return figures(
        [
            (picture(hide_patches(shown, mask.numpy()), "The image as the tokenizer gets it"), goes_in),
            (picture(restored, "The image painted back from its codes"), comes_back),
            *maps,
        ],
        "An image, its reconstruction and its two maps of codes",
    )


def read_pixels(image: str | None) -> torch.Tensor:
    """
    An uploaded image as the image tokenizer takes it.

    Args:
        image (`str`, *optional*): path of the image.

    Returns:
        `torch.Tensor` of shape `(1, 3, size, size)`.

    Raises:
        VisitorError: if it cannot be read.
    """
    return load().processor.image_processor(open_image(image), return_tensors="pt")["pixel_values"]


def _per_pixel(mask, pixels):
    """A mask over patches, `(patches,)`, as one over pixels, `(height, width)`."""
    grid = round(len(mask) ** 0.5)
    side = pixels.shape[-1] // grid
    return mask.view(grid, grid).repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)


def image_input(elem_id: str, label: str = "Image", value: str | None = None) -> gr.Image:
    """An upload of one image, given to functions as a path: they look at its size before they decode it."""
    image = gr.Image(
        value, type="filepath", sources=["upload", "clipboard"], label=label, elem_id=elem_id, height=220, buttons=[],
        alt_text="The image you chose",
    )  # fmt: skip
    # `gr.Image` would open the file here, and its errors explain nothing.
    image.preprocess = partial(_path_of, image.GRADIO_CACHE)  # type: ignore[method-assign]
    return image


def _path_of(uploads: str, payload: ImageData | None) -> str | None:
    """The path of an upload or an example. Others are refused: gradio checks only what calls itself a file."""
    if payload is None or payload.path is None:
        return None
    path = Path(payload.path).resolve()
    if not any(path.is_relative_to(Path(folder).resolve()) for folder in (uploads, EXAMPLES)):
        raise gr.Error(
            "Only images uploaded here can be opened. Upload one, or pick an example.", print_exception=False
        )
    return payload.path


def image_examples(image: gr.Image) -> None:
    """One-click examples for an [`image_input`]."""
    gr.Examples([[str(EXAMPLES / name)] for name in ALT_TEXTS], image, label="Examples")


def build_tokenizer() -> None:
    """Puts the look at the image tokenizer into the tab that is open."""
    patches = load().processor.image_grid ** 2
    gr.Markdown(EXPLANATION)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            image = image_input("tokenizer-image", value=FIRST_IMAGE)
            image_examples(image)
            hidden = gr.Slider(
                0, patches - 1, 0, step=1, label="Patches to hide", info=f"Of {patches}, in a random order."
            )
        with gr.Column(scale=2, min_width=260):
            shown = gr.HTML(tokenize(FIRST_IMAGE), elem_id="tokenizer-shown")
    gr.on(
        [image.change, hidden.change], gpu(tokenize), [image, hidden], shown,
        api_name="tokenize", show_progress="minimal", trigger_mode="always_last",
    )  # fmt: skip
