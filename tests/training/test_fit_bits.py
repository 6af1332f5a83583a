"""The bits of the image tokenizer, fitted to pixels before its decoder is trained."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel

from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from tests.training.libra_parts import SMALL_TOKENIZER
from training.fit_bits import SOFT_SHARE, cut_patches, fit_bits, principal_bits, trained_signs


class Blots(Dataset):
    """Images of patches of one colour each, as CLIP reads them."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        colours = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": colours.repeat_interleave(12, 1).repeat_interleave(12, 2)}


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=12
    )
    return LibraImageTokenizer.from_clip(CLIPVisionModel(config), **SMALL_TOKENIZER)


def test_patches_are_row_by_row():
    image = torch.arange(3 * 16).view(1, 3, 4, 4).float()
    patches = cut_patches(image, 2)
    assert patches.shape == (1, 4, 12)
    assert torch.equal(patches[0, 1].view(3, 2, 2), image[0, :, :2, 2:])


def test_fitted_codes_say_more_about_pixels(tokenizer):
    pixels = torch.stack([sample["pixel_values"] for sample in Blots()])
    colours = cut_patches(pixels, 4).flatten(0, 1).unflatten(1, (3, -1)).mean(dim=-1)  # (patches, 3)

    def left_unsaid():
        codes = tokenizer.encode(pixels).codes.flatten(0, 1)
        signs = tokenizer.quantizer.codes_to_signs(codes).flatten(1)
        inputs = torch.cat([signs, torch.ones(len(signs), 1)], dim=1)
        return float((inputs @ torch.linalg.lstsq(inputs, colours, driver="gelsd").solution - colours).square().mean())

    before = left_unsaid()
    torch.manual_seed(0)
    fit_bits(tokenizer, Blots(), steps=30)
    assert left_unsaid() < 0.8 * before


def test_principal_bits_find_what_pixels_depend_on():
    """Of ten features, two decide about the pixels: the bits are functions of these, half of the patches on each side."""
    torch.manual_seed(0)
    features = torch.randn(4000, 10)
    patches = torch.cat([features[:, :2], -features[:, :1]], dim=1)
    weight, bias = principal_bits(features, patches, bits=2)
    assert weight[:, 2:].abs().max() < 0.05 * weight[:, :2].abs().max()
    values = features @ weight.T + bias
    assert ((values > 0).float().mean(dim=0) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("progress", [SOFT_SHARE, 0.99])
def test_at_last_bits_are_signs_with_a_gradient(progress):
    """A hyperbolic tangent would tell the decoder more than a code does."""
    values = torch.tensor([-2.0, -0.01, 0.0, 0.3], requires_grad=True)
    signs = trained_signs(values, progress)
    assert torch.allclose(signs, torch.tensor([-1.0, -1.0, -1.0, 1.0]))
    signs.sum().backward()
    assert (values.grad > 0).all()
    assert values.grad[1] > values.grad[0]


def test_more_bits_than_there_is_room_for_are_refused(tokenizer):
    tokenizer.config.embed_dim = 2
    with pytest.raises(ValueError, match="bits a patch cannot be fitted"):
        fit_bits(tokenizer, Blots(), steps=1)
