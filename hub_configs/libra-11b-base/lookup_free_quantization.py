"""Lookup-free quantization (LFQ): a code is the sign pattern of a few numbers, so there is no codebook to learn.

A patch is projected to `num_codebooks * log2(codebook_size)` numbers. The sign of each is one bit (a number > 0 is a
1), the first bit of a codebook is its most significant one, and the quantized value is +1 or -1 per bit, projected
back. "Libra", section 3.1; the training terms are those of MAGVIT-v2 (arXiv 2310.05737).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBABILITY_FLOOR = 1e-5
"""Probabilities are clamped here before their logarithm is taken."""


class QuantizerLosses(NamedTuple):
    """Training terms of the quantizer, float32 scalars.

    Attributes:
        per_sample_entropy: Mean entropy of the soft code assignment of a patch, to be made small (confident codes).
        codebook_entropy: Entropy of the mean assignment over the batch, to be made large (all codes in use).
        commitment: Mean squared distance of the projected values from their signs.
    """

    per_sample_entropy: Tensor
    codebook_entropy: Tensor
    commitment: Tensor


class QuantizerOutput(NamedTuple):
    """Output of [`LookupFreeQuantizer`].

    Attributes:
        quantized: (..., dim), the projected sign patterns.
        codes: (..., num_codebooks), int64 in [0, codebook_size).
        losses: The training terms, or `None` when they were not asked for.
    """

    quantized: Tensor
    codes: Tensor
    losses: QuantizerLosses | None


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=PROBABILITY_FLOOR).log()).sum(dim=-1)


class LookupFreeQuantizer(nn.Module):
    """Quantizes vectors to sign patterns in several codebooks.

    Args:
        dim (`int`): Width of the vectors on both sides.
        num_codebooks (`int`): Codes per vector.
        codebook_size (`int`): Entries per codebook, a power of two.
        inverse_temperature (`float`, *optional*, defaults to 100.0): Sharpness of the soft assignment in the entropies.

    Raises:
        `ValueError`: If `codebook_size` is not a power of two.
    """

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int, inverse_temperature: float = 100.0):
        super().__init__()
        if codebook_size < 2 or codebook_size & (codebook_size - 1) != 0:
            raise ValueError(f"codebook_size must be a power of two, at least 2, got {codebook_size}.")
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.bits = codebook_size.bit_length() - 1
        self.inverse_temperature = inverse_temperature
        self.project_in = nn.Linear(dim, num_codebooks * self.bits)
        self.project_out = nn.Linear(num_codebooks * self.bits, dim)

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.arange(self.bits - 1, -1, -1, device=device)  # (bits,), most significant bit first

    def signs_to_codes(self, signs: Tensor) -> Tensor:
        """Codes (..., num_codebooks) int64 of numbers (..., num_codebooks, bits): a number > 0 is a 1."""
        return ((signs > 0).long() << self._shifts(signs.device)).sum(dim=-1)

    def codes_to_signs(self, codes: Tensor) -> Tensor:
        """Sign patterns (..., num_codebooks, bits), +1 or -1, of codes (..., num_codebooks).

        Raises:
            `ValueError`: If a code is outside [0, codebook_size), or there is not one code per codebook.
        """
        self.check_codes(codes)
        bits = (codes[..., None] >> self._shifts(codes.device)) & 1  # (..., num_codebooks, bits)
        return (2 * bits - 1).to(self.project_out.weight.dtype)

    def codes_to_quantized(self, codes: Tensor) -> Tensor:
        """Quantized vectors (..., dim) of codes (..., num_codebooks), as the forward pass gives them.

        Raises:
            `ValueError`: If a code is outside [0, codebook_size), or there is not one code per codebook.
        """
        return self.project_out(self.codes_to_signs(codes).flatten(-2))

    def forward(self, hidden: Tensor, return_losses: bool | None = None) -> QuantizerOutput:
        """Quantizes `hidden`; in training, gradients pass the signs straight through.

        Args:
            hidden (`torch.Tensor` of shape `(..., dim)`): Vectors to quantize.
            return_losses (`bool`, *optional*, defaults to `self.training`): Whether to compute the training terms.

        Returns:
            [`QuantizerOutput`]: quantized (..., dim), codes (..., num_codebooks), losses or `None`.
        """
        values = self.project_in(hidden).unflatten(-1, (self.num_codebooks, self.bits))  # (..., codebooks, bits)
        signs = torch.where(values > 0, 1.0, -1.0).to(values.dtype)  # (..., codebooks, bits)
        losses = self._losses(values, signs) if (self.training if return_losses is None else return_losses) else None
        # numerically the signs; the gradient is that of the values
        passed = values + (signs - values).detach() if self.training else signs
        return QuantizerOutput(self.project_out(passed.flatten(-2)), self.signs_to_codes(values), losses)

    def _losses(self, values: Tensor, signs: Tensor) -> QuantizerLosses:
        values = values.float().flatten(0, -3)  # (rows, codebooks, bits)
        signs = signs.float().flatten(0, -3)
        entries = torch.arange(self.codebook_size, device=values.device)[:, None]
        codebook = ((entries >> self._shifts(values.device)) & 1).float() * 2 - 1  # (codebook_size, bits)
        # squared distance up to a constant is -2 <value, entry>; in the thousands, where bfloat16 knows no differences
        with torch.autocast(values.device.type, enabled=False):
            distances = -2 * values @ codebook.T  # (rows, codebooks, codebook_size)
        probabilities = (-self.inverse_temperature * distances).softmax(dim=-1)  # (rows, codebooks, codebook_size)
        return QuantizerLosses(
            per_sample_entropy=_entropy(probabilities).mean(),
            codebook_entropy=_entropy(probabilities.mean(dim=0)).mean(),
            commitment=F.mse_loss(values, signs),
        )

    def check_codes(self, codes: Tensor):
        """Refuses codes (..., num_codebooks) that this quantizer cannot have made.

        Raises:
            `ValueError`: If a code is outside [0, codebook_size), or there is not one code per codebook.
        """
        if codes.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"The last dimension of the codes must be the {self.num_codebooks} codebooks, got shape {tuple(codes.shape)}."
            )
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise ValueError(
                f"Codes must be in [0, {self.codebook_size}), got values from {int(codes.min())} to {int(codes.max())}."
            )
