"""Perceptual distances and the weight of the adversary."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from training.image_tokenizer_losses import adaptive_weight, encoder_distance, load_lpips
from training.reconstruction import clip_to_unit


def test_adaptive_weight_by_hand():
    found = adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([[0.0], [2.0]]))
    assert found.item() == pytest.approx(5 / (2 + 1e-4))
    assert adaptive_weight(torch.ones(4), torch.zeros(4)).item() == 1e4  # 2 / 1e-4, clamped
    assert adaptive_weight(torch.zeros(4), torch.ones(4)) == 0


def test_adaptive_weight_makes_both_gradients_alike():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 2), torch.randn(8, 4)
    losses = [layer(inputs).abs().mean(), 100 * layer(inputs).square().mean()]
    gradients = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in losses]
    weight = adaptive_weight(*gradients)
    assert not weight.requires_grad
    (weight * losses[1]).backward()
    torch.testing.assert_close(layer.weight.grad.norm(), gradients[0].norm(), rtol=1e-3, atol=0)


def test_encoder_distance():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = LibraImageTokenizer.from_clip(
        CLIPVisionModel(config), select_layers=(1,), embed_dim=8, ch=32, ch_mult=(1,), resolution=2, num_attn_heads=1
    )
    pixels = torch.randn(2, 3, 16, 16)
    same = clip_to_unit(pixels)
    assert encoder_distance(model, same, pixels, layer=1).item() == pytest.approx(0, abs=1e-6)
    other = (same + 0.1 * torch.randn_like(same)).requires_grad_()
    distance = encoder_distance(model, other, pixels, layer=1)
    assert distance > 1e-4
    distance.backward()
    assert other.grad.abs().sum() > 0


def lpips_module(constructor) -> ModuleType:
    """A module with the interface of the package."""
    module = ModuleType("lpips")
    module.LPIPS = constructor
    return module


class SquaredDifference(nn.Module):
    """Takes what LPIPS takes, gives what it gives."""

    def __init__(self, net, verbose):
        super().__init__()
        assert (net, verbose) == ("vgg", False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, in0, in1):
        return self.scale * (in0 - in1).square().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_is_frozen(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", lpips_module(SquaredDifference))
    distance = load_lpips()
    assert not distance.training
    assert not distance.scale.requires_grad


def test_without_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"pip install 'libra-vlm\[lpips\]'.*perceptual: encoder"):
        load_lpips()


def test_without_the_weights_of_vgg(monkeypatch):
    def no_network(**kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setitem(sys.modules, "lpips", lpips_module(no_network))
    with pytest.raises(OSError, match=r"unreachable.*perceptual: encoder"):
        load_lpips()
