"""Measures of reconstructions, and pictures of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from training.reconstruction import (
    ReconstructionGrids,
    clip_to_unit,
    codebook_use,
    count_codes,
    psnr,
    reconstruction_grid,
    ssim,
    unit_to_clip,
)


def test_pixel_scales_are_inverse():
    pixels = torch.rand(2, 3, 4, 4) * 2 - 1
    torch.testing.assert_close(clip_to_unit(unit_to_clip(pixels)), pixels)
    white = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(unit_to_clip(torch.ones(1, 3, 1, 1)).flatten(), white)


def test_psnr():
    target = torch.zeros(2, 3, 4, 4)
    found = psnr(torch.stack([target[0] + 0.2, target[1] + 5.0]), target)
    assert found.tolist() == pytest.approx([20.0, 6.0206], abs=1e-3)  # 4 / 0.04; clamped to 1: 4 / 1


def test_ssim():
    """1 for the same image. Of two flat images only the luminance term is left, of intensities: black is 0."""
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    assert ssim(image, image).tolist() == pytest.approx([1.0])
    flat = ssim(torch.stack([torch.full((3, 16, 16), value) for value in (0.0, 7.0)]), torch.full((2, 3, 16, 16), -0.5))
    a, b, c = torch.tensor([0.5, 1.0]), 0.25, 0.01**2  # 7 is clamped to white
    torch.testing.assert_close(flat, (2 * a * b + c) / (a**2 + b**2 + c), rtol=1e-3, atol=1e-3)
    noisy = ssim(image + 0.3 * torch.randn_like(image), image)
    assert noisy.shape == (1,)
    assert 0 < noisy.item() < 0.99


def test_codebook_use():
    codes = torch.stack([torch.arange(64) % 4, torch.zeros(64, dtype=torch.long)], dim=-1)
    use = codebook_use(count_codes(codes.reshape(4, 16, 2), 8))
    assert use == {"usage_0": 0.5, "perplexity_0": 4.0, "usage_1": 0.125, "perplexity_1": 1.0}


@given(st.lists(st.integers(0, 7), min_size=1, max_size=60))
@settings(max_examples=50)
def test_codebook_use_of_any_codes(codes):
    counts = count_codes(torch.tensor(codes)[:, None], 8)
    np.testing.assert_array_equal(counts[0].numpy(), np.bincount(codes, minlength=8))
    use = codebook_use(counts)
    assert use["usage_0"] == pytest.approx(len(set(codes)) / 8, abs=1e-4)
    assert 1 <= use["perplexity_0"] <= len(set(codes)) + 0.05


def test_grid():
    """Each image above its reconstruction, black and white at the ends of the scale."""
    target = torch.stack([torch.full((3, 2, 3), -1.0), torch.full((3, 2, 3), 1.0)])
    pixels = np.asarray(reconstruction_grid(target, torch.stack([torch.zeros(3, 2, 3), torch.full((3, 2, 3), 4.0)])))
    assert pixels.shape == (4, 6, 3)
    assert pixels[::2, ::3, 0].tolist() == [[0, 255], [128, 255]]


def test_drawing_a_grid(tmp_path):
    """In training, and without changing anything; gradients are those there were."""
    torch.manual_seed(0)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    decoder = {"z_channels": 32, "ch": 32, "ch_mult": (1, 1), "num_res_blocks": 0, "num_attn_heads": 1}
    model = LibraImageTokenizer.from_clip(clip, select_layers=(0, 1), embed_dim=16, codebook_size=4, **decoder).train()
    pixels = unit_to_clip(torch.rand(5, 3, 16, 16) * 2 - 1)
    path = ReconstructionGrids(pixels, steps=0).draw(model, tmp_path, 7)
    assert path == tmp_path / "reconstructions" / "step-000007.png"
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    drawn = np.asarray(Image.open(path))
    assert drawn.shape == (32, 80, 3)
    reconstruction = model.eval()(pixels).reconstruction.detach()
    wanted = np.asarray(reconstruction_grid(clip_to_unit(pixels), reconstruction))
    assert np.abs(drawn.astype(int) - wanted.astype(int)).max() <= 1
