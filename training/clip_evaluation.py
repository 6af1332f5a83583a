"""What the small CLIP knows: zero-shot names of objects, and a linear probe on the features that Libra reads."""

from collections.abc import Sequence

import torch
from transformers import CLIPModel, CLIPVisionModel, PreTrainedTokenizerFast

from .clip_objective import region_features


@torch.inference_mode()
def zero_shot_accuracy(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    labels: Sequence[str],
    batch_size: int = 64,
) -> float:
    """
    How often the text nearest to the mean patch of an image is its label.

    Args:
        model (`CLIPModel`): The model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerFast`): Tokenizer of its text tower.
        pixel_values (`torch.Tensor`): `(images, 3, size, size)`.
        targets (`torch.Tensor`): int64 `(images,)` in [0, len(labels)).
        labels (`Sequence[str]`): The possible names.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.

    Returns:
        `float`: Accuracy in [0, 1].
    """
    texts = model.get_text_features(**tokenizer(list(labels), padding=True, return_tensors="pt")).pooler_output
    texts = torch.nn.functional.normalize(texts, dim=-1)  # (labels, projection)
    right = 0
    for pixels, expected in zip(pixel_values.split(batch_size), targets.split(batch_size)):
        patches = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
        features = region_features(model, patches)[:, 0]  # (n, projection)
        right += int(((features @ texts.T).argmax(dim=1) == expected).sum())
    return right / len(targets)


@torch.inference_mode()
def libra_features(
    model: CLIPVisionModel, pixel_values: torch.Tensor, select_layers: Sequence[int], batch_size: int = 64
) -> torch.Tensor:
    """
    The features Libra reads, averaged over the patches of an image.

    Args:
        model (`CLIPVisionModel`): The model, in evaluation mode.
        pixel_values (`torch.Tensor`): `(images, 3, size, size)`.
        select_layers (`Sequence[int]`): Indices into the hidden states, 0 being the embeddings.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.

    Returns:
        `torch.Tensor`: `(images, len(select_layers) * hidden_size)`.
    """
    features = []
    for pixels in pixel_values.split(batch_size):
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        features.append(torch.cat([states[layer][:, 1:] for layer in select_layers], dim=-1).mean(dim=1))
    return torch.cat(features)


def fit_probe(features: torch.Tensor, targets: torch.Tensor, num_labels: int, ridge: float = 0.1) -> torch.Tensor:
    """
    A linear classifier by ridge regression on one-hot targets.

    Args:
        features (`torch.Tensor`): `(n, width)`, standardised.
        targets (`torch.Tensor`): int64 `(n,)` in [0, num_labels).
        num_labels (`int`): Number of classes.
        ridge (`float`, *optional*, defaults to 0.1): Strength of the penalty, relative to the number of examples.

    Returns:
        `torch.Tensor`: Weights of shape `(width + 1, num_labels)`, the bias last.
    """
    inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()  # (n, width + 1)
    penalty = ridge * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    hot = torch.nn.functional.one_hot(targets, num_labels).double()
    return torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ hot).float()


def probe_accuracy(
    train: tuple[torch.Tensor, torch.Tensor], tests: Sequence[tuple[torch.Tensor, torch.Tensor]], num_labels: int
) -> list[float]:
    """
    Accuracy of a linear probe trained on one set of features and tested on others.

    Args:
        train (`tuple[torch.Tensor, torch.Tensor]`): Features `(n, width)` and int64 targets `(n,)`.
        tests (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): Pairs like `train`.
        num_labels (`int`): Number of classes.

    Returns:
        `list[float]`: Accuracy in [0, 1] of each test set.
    """
    mean, std = train[0].mean(dim=0), train[0].std(dim=0) + 1e-6
    weights = fit_probe((train[0] - mean) / std, train[1], num_labels)
    accuracies = []
    for features, targets in tests:
        scores = (features - mean) / std @ weights[:-1] + weights[-1]  # (n, labels)
        accuracies.append(float((scores.argmax(dim=1) == targets).float().mean()))
    return accuracies
