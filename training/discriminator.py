"""The adversary of the image tokenizer: a patch discriminator with its own optimizer (VQGAN, arXiv 2012.09841).

The discriminator looks at overlapping patches of an image and says of each whether it is real; the decoder learns to
make it say so of reconstructions. Loss and shape are those of taming-transformers, which the authors of Libra train
with; the norm differs, see [`PatchDiscriminator`].
"""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainingArguments, get_scheduler

CHECKPOINT_NAME = "discriminator.pt"
"""File of a checkpoint with the weights, the optimizer and the learning rate schedule of the discriminator."""

NORM_GROUP_WIDTH = 16
"""Channels that are normalised together."""


class PatchDiscriminator(nn.Module):
    """
    The PatchGAN discriminator of pix2pix (arXiv 1611.07004): one logit for each of many overlapping patches.

    Group norm takes the place of batch norm. Batch norm would make the logits of an image depend on the other images of
    its batch, which are few at 336 pixels, differ from device to device, and are either all real or all reconstructions;
    group norm gives the same logits on one device and on many.

    Args:
        channels (`int`, *optional*, defaults to 64): Channels after the first convolution, a multiple of 8.
        num_layers (`int`, *optional*, defaults to 3): Convolutions that halve the image. With three, a patch is 70 pixels.

    Raises:
        ValueError: If `channels` is not a positive multiple of 8, or `num_layers` is below 1.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if channels < 1 or 2 * channels % NORM_GROUP_WIDTH:
            raise ValueError(
                f"The channels of the discriminator must be a positive multiple of {NORM_GROUP_WIDTH // 2} (group norm), "
                f"found {channels}."
            )
        if num_layers < 1:
            raise ValueError(f"The discriminator must have at least 1 layer, found {num_layers}.")
        self.num_layers = num_layers
        widths = [channels * min(2**depth, 8) for depth in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for depth in range(1, num_layers + 1):
            layers += [
                nn.Conv2d(
                    widths[depth - 1], widths[depth], 4, stride=2 if depth < num_layers else 1, padding=1, bias=False
                ),
                nn.GroupNorm(widths[depth] // NORM_GROUP_WIDTH, widths[depth]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    @property
    def smallest_image(self) -> int:
        """`int`: Side of the smallest image that still gives a logit."""
        return 3 * 2**self.num_layers

    def forward(self, pixels: Tensor) -> Tensor:
        """
        Args:
            pixels (`torch.Tensor` of shape `(n, 3, h, w)`): Images in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(n, 1, h / 2 ** num_layers - 2, w / 2 ** num_layers - 2)`, rounded down: Logits, high
            where a patch seems real.
        """
        return self.layers(pixels)


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """
    What the discriminator makes small (equation 6 of arXiv 1705.02894, halved as in taming-transformers).

    Args:
        logits_real, logits_fake (`torch.Tensor`, of any shape): Logits of images and of reconstructions.

    Returns:
        `torch.Tensor` of shape `()`: 0 if all real patches are above 1 and all reconstructed ones below -1.
    """
    return (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()) / 2


class Adversary:
    """
    A discriminator in training beside the decoder: its two losses, its optimizer, its place in the checkpoints.

    It has an AdamW with the betas, epsilon and weight decay of the decoder's, and a schedule of the same kind over its
    own steps, those from `start` on, warmup included.

    Args:
        discriminator ([`PatchDiscriminator`]): The network.
        accelerator (`Accelerator`): That of the Trainer.
        args (`TrainingArguments`): Those of the Trainer.
        learning_rate (`float`): Peak learning rate.
        start (`int`): The first step (counted from 0) in which it takes part.
    """

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        accelerator: Accelerator,
        args: TrainingArguments,
        learning_rate: float,
        start: int,
    ) -> None:
        self.discriminator = discriminator
        self.accelerator = accelerator
        self.args = args
        self.learning_rate = learning_rate
        self.start = start

    def prepare(self, num_training_steps: int) -> None:
        """
        Makes the optimizer and the schedule, and wraps the discriminator for the devices there are.

        Args:
            num_training_steps (`int`): Steps of the whole run; the adversary has those from its start on.
        """
        steps = max(num_training_steps - self.start, 1)
        optimizer = torch.optim.AdamW(
            self.discriminator.parameters(),
            lr=self.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )
        self.scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.discriminator, optimizer)

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """
        What the decoder makes small: reconstructions should seem real. The discriminator itself gets no gradient.

        Args:
            reconstruction (`torch.Tensor` of shape `(n, 3, h, w)`): In [-1, 1].

        Returns:
            `torch.Tensor` of shape `()`: The mean logit, negated.
        """
        # not the wrapped one: under DDP, each of its forward passes must be followed by a backward pass to its weights
        constants = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        return -functional_call(self.discriminator, constants, (reconstruction,)).mean()

    def update(self, target: Tensor, reconstruction: Tensor, accumulation_steps: int) -> dict[str, Tensor]:
        """
        Trains the discriminator on a batch; the weights change with the last batch of an accumulation.

        Args:
            target, reconstruction (`torch.Tensor` of shape `(n, 3, h, w)`): Images and what became of them, in [-1, 1].
            accumulation_steps (`int`): Batches of this accumulation.

        Returns:
            `dict[str, torch.Tensor]`: `discriminator_loss`, and the mean logits `logits_real` and `logits_fake`.
        """
        last = self.accelerator.sync_gradients
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            real, fake = self.wrapped(torch.cat([target, reconstruction.detach()])).chunk(2)  # (n, 1, h', w') each
            loss = hinge_loss(real, fake)
            self.accelerator.backward(loss / accumulation_steps)
        self.optimizer.step()  # accelerate's: like zero_grad, it waits for the last batch
        self.optimizer.zero_grad()
        if last:
            self.scheduler.step()
        return {"discriminator_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def save(self, checkpoint: str | Path) -> None:
        """
        Writes weights, optimizer and schedule to a checkpoint.

        Args:
            checkpoint (`str` or `Path`): Its folder.
        """
        state = {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        torch.save(state, Path(checkpoint, CHECKPOINT_NAME))

    def load(self, checkpoint: str | Path) -> None:
        """
        Takes over what [`~Adversary.save`] wrote.

        Args:
            checkpoint (`str` or `Path`): Its folder.

        Raises:
            FileNotFoundError: If the checkpoint was written without a discriminator.
        """
        path = Path(checkpoint, CHECKPOINT_NAME)
        if not path.is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no {CHECKPOINT_NAME}: it was written without a discriminator "
                "(gan_weight 0 or save_only_model). Go on with gan_weight 0, or begin a run of its own in another output_dir."
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
