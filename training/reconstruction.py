"""How good reconstructions are: PSNR, SSIM, the use of the codebooks, and pictures to look at."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from processing.modeling_libra_image_tokenizer import LibraImageTokenizer

from .images import CLIP_MEAN, CLIP_STD


def clip_to_unit(pixel_values: Tensor) -> Tensor:
    """Pixels as CLIP reads them, `(n, 3, h, w)`, as the decoder writes them: -1 is black and 1 is white."""
    mean, std = (pixel_values.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixel_values * std + mean) * 2 - 1


def unit_to_clip(pixels: Tensor) -> Tensor:
    """The inverse of [`clip_to_unit`]."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """
    Peak signal-to-noise ratio of pixels in [-1, 1], in decibels.

    Args:
        reconstruction, target (`torch.Tensor` of shape `(n, 3, h, w)`): Compared after clamping.

    Returns:
        `torch.Tensor` of shape `(n,)`.
    """
    error = (reconstruction.clamp(-1, 1) - target.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """
    Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, mean of the colour channels.

    Args:
        reconstruction, target (`torch.Tensor` of shape `(n, 3, h, w)`): Pixels in [-1, 1], at least 6 a side; compared
            after clamping.

    Returns:
        `torch.Tensor` of shape `(n,)`, at most 1.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    # the luminance term is defined for intensities, black at 0
    found, wanted = ((pixels.float().clamp(-1, 1) + 1) / 2 for pixels in (reconstruction, target))  # (n, 3, h, w) each
    values = structural_similarity_index_measure(found, wanted, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)  # a tuple only with its options for further results
    return values.reshape(len(target))


def count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """
    How often each entry of each codebook occurs.

    Args:
        codes (`torch.Tensor` of shape `(..., num_codebooks)`): Codes of many patches.
        codebook_size (`int`): Entries per codebook.

    Returns:
        `torch.LongTensor` of shape `(num_codebooks, codebook_size)`.
    """
    columns = codes.flatten(0, -2).T  # (num_codebooks, patches)
    counts = codes.new_zeros(len(columns), codebook_size)
    return counts.scatter_add_(1, columns, torch.ones_like(columns))  # unlike bincount, without waiting for a GPU


def codebook_use(counts: Tensor) -> dict[str, float]:
    """
    How much of each codebook is in use.

    Args:
        counts (`torch.LongTensor` of shape `(num_codebooks, codebook_size)`): See [`count_codes`].

    Returns:
        `dict[str, float]`: `usage_i`, the share of entries that occur, in [0, 1], and `perplexity_i`, in
        [1, codebook_size], for each codebook `i`.
    """
    found = {}
    for i, row in enumerate(counts.cpu()):
        share = row.double() / row.sum()  # (codebook_size,)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        found[f"usage_{i}"] = round(float((share > 0).double().mean()), 4)
        found[f"perplexity_{i}"] = round(float(entropy.exp()), 1)
    return found


def reconstruction_grid(target: Tensor, reconstruction: Tensor) -> Image.Image:
    """
    Images side by side, each above its reconstruction.

    Args:
        target, reconstruction (`torch.Tensor` of shape `(n, 3, h, w)`): Pixels in [-1, 1]; clamped.

    Returns:
        `Image.Image`: RGB, `n * w` wide and `2 * h` high.
    """
    rows = [torch.cat(list(pixels), dim=-1) for pixels in (target, reconstruction)]  # (3, h, n * w) each
    picture = (torch.cat(rows, dim=-2).float().clamp(-1, 1) + 1) * 127.5  # (3, 2 * h, n * w)
    return Image.fromarray(picture.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


class ReconstructionGrids(TrainerCallback):
    """
    Draws the same images and their reconstructions during a run and at its end: `reconstructions/step-000100.png`.

    Args:
        pixel_values (`torch.Tensor` of shape `(n, 3, image_size, image_size)`): The images, as CLIP reads them.
        steps (`int`): Steps between two pictures; 0 for one at the end only.
    """

    def __init__(self, pixel_values: Tensor, steps: int) -> None:
        self.pixel_values = pixel_values
        self.steps = steps

    def on_step_end(self, args, state, control, model: LibraImageTokenizer, **kwargs) -> None:
        """Draws every `steps` steps."""
        if self.steps and state.global_step % self.steps == 0 and state.is_world_process_zero:
            self.draw(model, args.output_dir, state.global_step)

    def on_train_end(self, args, state, control, model: LibraImageTokenizer, **kwargs) -> None:
        """Draws what the trained model makes of the images."""
        if state.is_world_process_zero:
            self.draw(model, args.output_dir, state.global_step)

    def draw(self, model: LibraImageTokenizer, output_dir: str | Path, step: int) -> Path:
        """
        Writes one picture.

        Args:
            model ([`LibraImageTokenizer`]): Its mode, training or evaluation, stays as it is.
            output_dir (`str` or `Path`): Folder of the run.
            step (`int`): For the name of the file.

        Returns:
            `Path`: The file.
        """
        # neither dropout nor batch statistics in it: training mode would draw the same
        reconstruction = model.decode(model.encode(self.pixel_values).codes)  # (n, 3, image_size, image_size)
        path = Path(output_dir, "reconstructions", f"step-{step:06d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        reconstruction_grid(clip_to_unit(self.pixel_values), reconstruction.cpu()).save(path)
        return path
