"""Row (b) of the paper's Table 3, contiguous supervision: images are predicted as continuous features, not as codes."""

import torch
from torch import nn
from torch.nn import functional as F

from modeling_libra import LibraConfig


class FeatureHead(nn.Module):
    """
    Predicts the features of the next patch from a vision row. It is part of the training, not of the model: it hangs on
    the model while that is trained, so that optimizer and checkpoints have it, and is taken off before the model is saved.

    Args:
        config ([`LibraConfig`]): of the model.
    """

    def __init__(self, config: LibraConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.text_config.hidden_size, config.feature_size)

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor, image_features: torch.Tensor):
        """
        The squared error of each patch, averaged over its features. Targets have zero mean and unit variance within a
        patch: raw features of CLIP are dominated by a few of their entries.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`): normed, as the model's heads read them.
            input_ids (`torch.LongTensor` of shape `(batch, length)`): flat ids.
            image_features (`torch.Tensor` of shape `(images, patches, feature_size)`): of all images, in reading order.

        Returns:
            `torch.Tensor` of shape `(images * patches,)`, in float32. BOI predicts the first patch of its image.
        """
        is_code = (input_ids >= self.config.text_vocab_size) & (input_ids < self.config.boi_token_id)
        predicted = self.proj(hidden_states[:, :-1][is_code[:, 1:]]).float()  # (images * patches, feature_size)
        wanted = F.layer_norm(image_features.flatten(0, 1).float(), image_features.shape[-1:])
        return (predicted - wanted).square().mean(dim=-1)

    @staticmethod
    def joint_loss(
        text_loss: torch.Tensor,
        errors: torch.Tensor,
        num_texts: torch.Tensor,
        num_items: torch.Tensor | int | None = None,
        processes: int = 1,
    ) -> torch.Tensor:
        """
        The loss of both modalities, averaged over all that is supervised, as [`modeling_libra.loss_libra.libra_loss`]
        averages codes and text.

        Args:
            text_loss (`torch.Tensor` of shape `()`):
                Mean over the supervised text tokens; with `num_items`, their part of the loss of the step, as the Trainer
                has it.
            errors (`torch.Tensor` of shape `(images * patches,)`): as [`FeatureHead.forward`] gives them.
            num_texts (`torch.Tensor` of shape `()`): supervised text tokens of the batch.
            num_items (`torch.Tensor` or `int`, *optional*): supervised tokens and patches of the whole step.
            processes (`int`, *optional*, defaults to 1): whose losses are averaged.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        if num_items is not None:
            return text_loss + errors.sum() * processes / num_items
        return (text_loss * num_texts + errors.sum()) / (num_texts + len(errors))
