"""Routing: which rows go through which parameters, and the low-rank map the vision parameters are made of."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Routing(NamedTuple):
    """Which rows of a flattened batch go through which parameters. Planned once per forward.

    Args:
        is_vision (`torch.BoolTensor` of shape `(batch, length)`): the modality of each token.
        language_rows (`torch.LongTensor` of shape `(language tokens,)`): rows of the flattened batch, ascending.
        vision_rows (`torch.LongTensor` of shape `(vision tokens,)`): likewise.
        inverse (`torch.LongTensor` of shape `(batch * length,)`):
            Where each row of the flattened batch is in language rows followed by vision rows.
    """

    is_vision: torch.Tensor
    language_rows: torch.Tensor
    vision_rows: torch.Tensor
    inverse: torch.Tensor


def plan_routing(is_vision: torch.Tensor) -> Routing:
    """
    Args:
        is_vision (`torch.BoolTensor` of shape `(batch, length)`): the modality of each token.

    Returns:
        [`Routing`]
    """
    flat = is_vision.flatten()
    language_rows, vision_rows = (~flat).nonzero().squeeze(1), flat.nonzero().squeeze(1)
    inverse = torch.cat([language_rows, vision_rows]).argsort()
    return Routing(is_vision, language_rows, vision_rows, inverse)


def route(hidden_states: torch.Tensor, routing: Routing | None, language_map: Callable, vision_map: Callable):
    """
    Applies one map to the language rows and another to the vision rows.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, width)`): all rows.
        routing ([`Routing`] or `None`): the plan; `None` when every row is language.
        language_map, vision_map (`Callable`): from `(rows, width)` to `(rows, out)`.

    Returns:
        `torch.Tensor` of shape `(batch, length, out)`.
    """
    if routing is None:
        return language_map(hidden_states)
    rows = hidden_states.flatten(0, 1)  # (batch * length, width)
    language = language_map(rows.index_select(0, routing.language_rows))
    vision = vision_map(rows.index_select(0, routing.vision_rows))
    mixed = torch.cat([language, vision]).index_select(0, routing.inverse)
    return mixed.unflatten(0, hidden_states.shape[:2])


class LowRankLinear(nn.Module):
    """
    A linear map of rank `rank` without bias, `x -> B(A(x))`: the building block of expert and bridge.

    It starts as wide as the dense map it stands for: the elements of the product `B A` have the standard deviation
    `text_config.initializer_range`, and the inner width has the scale of the input. So the expert begins as a fresh layer
    of the language model would: every layer adds to the vision rows by the same measure, and gets a gradient of the
    same size, whatever the width. The bridge begins closed: text and images read each other through plain keys and
    values, until its B, which has a gradient from the first step on, opens it.

    Args:
        in_features (`int`): width of the input.
        out_features (`int`): width of the output.
        rank (`int`): inner width.
        zero_init (`bool`, *optional*, defaults to `False`):
            Whether B starts at zero, so that the map starts as zero (the bridge does).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, zero_init: bool = False):
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        # The product B A has the spread of the dense matrix it replaces, N(0, std): with std(A) = 1/sqrt(in) the inner
        # width has the scale of the input, and B, in units of that std, makes up for the smaller sum: sqrt(in / rank).
        # On the halves, because transformers initialises no module that lacks parameters of its own.
        self.A.low_rank_std = in_features**-0.5  # type: ignore[assignment]
        gain = 0.0 if zero_init else (in_features / rank) ** 0.5
        self.B.low_rank_gain = gain  # type: ignore[assignment]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `(..., in_features)` to `(..., out_features)`."""
        return self.B(self.A(hidden_states))
