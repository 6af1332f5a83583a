"""The adversary of the image tokenizer: shapes, losses, where gradients go."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TrainingArguments

from training.discriminator import Adversary, PatchDiscriminator, hinge_loss


@given(num_layers=st.integers(1, 3), size=st.integers(6, 40))
@settings(max_examples=20)
def test_one_logit_per_patch(num_layers, size):
    discriminator = PatchDiscriminator(channels=8, num_layers=num_layers)
    if size < discriminator.smallest_image:
        with pytest.raises(RuntimeError):
            discriminator(torch.zeros(1, 3, size, size))
    else:
        side = size // 2**num_layers - 2
        assert discriminator(torch.zeros(2, 3, size, size)).shape == (2, 1, side, side)


def test_the_shape_of_taming():
    """That of its NLayerDiscriminator at the defaults, which has as many parameters (a norm of either kind has two a
    channel) and whose convolutions see 70 pixels."""
    discriminator = PatchDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    pixels = torch.zeros(1, 3, 128, 128, requires_grad=True)
    convolutions = [layer for layer in discriminator.layers if not isinstance(layer, nn.GroupNorm)]
    nn.Sequential(*convolutions)(pixels)[0, 0, 7, 7].backward()
    seen = pixels.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_logits_do_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    discriminator, pixels = PatchDiscriminator(channels=8), torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(discriminator(pixels)[1:2], discriminator(pixels[1:2]))


@pytest.mark.parametrize("arguments", [{"channels": 12}, {"channels": 0}, {"num_layers": 0}])
def test_sizes_that_do_not_work(arguments):
    with pytest.raises(ValueError, match="discriminator must"):
        PatchDiscriminator(**arguments)


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([-2.0, 0.5])
    assert hinge_loss(real, fake).item() == pytest.approx(((1 + 0 + 2) / 3 + (0 + 1.5) / 2) / 2)
    assert hinge_loss(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -9.0])) == 0


@pytest.fixture
def adversary(tmp_path):
    torch.manual_seed(0)
    args = TrainingArguments(str(tmp_path), use_cpu=True, warmup_steps=2, lr_scheduler_type="linear")
    adversary = Adversary(PatchDiscriminator(channels=8, num_layers=1), Accelerator(cpu=True), args, 1e-2, start=3)
    adversary.prepare(num_training_steps=10)
    return adversary


def test_the_generator_loss_has_no_gradient_to_the_discriminator(adversary):
    pixels = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = adversary.generator_loss(pixels)
    torch.testing.assert_close(loss, -adversary.discriminator(pixels).mean())
    loss.backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversary.discriminator.parameters())


def test_updates_tell_images_from_reconstructions(adversary):
    """And give reconstructions no gradient. The learning rate rises and falls over its own 10 - 3 steps."""
    real, fake = torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8).requires_grad_()
    rates, losses = [], []
    for _ in range(7):
        rates.append(adversary.scheduler.get_last_lr()[0])
        losses.append(adversary.update(real, fake, 1)["discriminator_loss"].item())
    assert rates == pytest.approx([0, 5e-3, 1e-2, 8e-3, 6e-3, 4e-3, 2e-3])
    assert losses[0] == losses[1] == pytest.approx(1, abs=0.1)  # the first step has learning rate 0
    assert losses[-1] < 0.5
    assert fake.grad is None


def test_accumulated_batches_are_one_batch(adversary):
    """The weights move with the last of them, by what the whole batch would do."""
    real, fake = torch.rand(4, 3, 8, 8), -torch.rand(4, 3, 8, 8)
    adversary.update(real, fake, 1)  # behind the step of learning rate 0
    state = {name: weight.clone() for name, weight in adversary.discriminator.state_dict().items()}
    optimizer = adversary.optimizer.state_dict()
    optimizer = {**optimizer, "state": {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer["state"].items()}}
    adversary.update(real, fake, 1)
    wanted = {name: weight.clone() for name, weight in adversary.discriminator.state_dict().items()}
    adversary.discriminator.load_state_dict(state)
    adversary.optimizer.load_state_dict(optimizer)
    gradients = adversary.accelerator.gradient_state
    gradients._set_sync_gradients(False)
    adversary.update(real[:2], fake[:2], 2)
    assert all(torch.equal(weight, state[name]) for name, weight in adversary.discriminator.state_dict().items())
    gradients._set_sync_gradients(True)
    adversary.update(real[2:], fake[2:], 2)
    torch.testing.assert_close(dict(adversary.discriminator.state_dict()), wanted)


def test_a_checkpoint_without_a_discriminator(adversary, tmp_path):
    with pytest.raises(FileNotFoundError, match="gan_weight 0"):
        adversary.load(tmp_path)
