"""Where an answer looks: the attention of its tokens on an image, and how diverse it is (Figures 4 and 7).

The maps of an answer are small (a row of patches for each token, layer and head); those of a whole forward are not (the
square of its length). So only the rows are ever computed: the prompt goes through the cache with whatever attention the
model has, and then one token at a time with eager attention, whose maps have one row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from .cache_libra import CACHE_NAME
from .image_blocks_libra import find_image_blocks


class LibraAttentionMapsMixin:
    """The part of a Libra that shows where it looks. Listed before the other bases of a model."""

    config: Any  # [`LibraConfig`], of the model
    model: Any  # [`LibraModel`], of the model

    @torch.no_grad()
    def attend_to_image(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.FloatTensor | None = None,
        answer_ids: torch.LongTensor | Sequence[int] = (),
        image_index: int = 0,
    ) -> torch.Tensor:
        """
        Attention on the patches of one image of the query that writes each answer token: of the last token of the prompt
        for the first one, of the answer token before it for the others.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`): the prompt, with its images.
            attention_mask (`torch.Tensor` of shape `(1, length)`, *optional*): 0 on padding, which may be on the left.
            image_features (`torch.FloatTensor` of shape `(images, patches, feature_size)`, *optional*): of the prompt.
            answer_ids (`torch.LongTensor` of shape `(tokens,)` or `(1, tokens)`, or `Sequence` of `int`):
                What the model wrote after the prompt, such as what `generate()` returned without it; at least one token.
            image_index (`int`, *optional*, defaults to 0): which whole image of the prompt, in reading order.

        Returns:
            `torch.FloatTensor` of shape `(tokens, layers, heads, patches)`: attention weights in `[0, 1]`, patches row by
            row. A query's weights on all that it sees sum to 1, so those on the image sum to at most 1; patches outside
            of a sliding window have 0.

        Raises:
            ValueError: if there is more than one row, no answer, or no such image; if the prompt ends in EOI, which
                predicts nothing, or in padding; and for wrong input, as the model's own forward.

        Example:

        ```python
        >>> ids = model.generate(**inputs, max_new_tokens=20)
        >>> answer = ids[0, inputs["input_ids"].shape[1] :]
        >>> maps = model.attend_to_image(**inputs, answer_ids=answer)
        >>> maps.mean(dim=(0, 2)).unflatten(-1, (model.config.image_grid, -1))  # a picture for each layer
        ```"""
        answer = torch.as_tensor(answer_ids, dtype=torch.long, device=input_ids.device).reshape(1, -1)
        self._check_question(input_ids, attention_mask, answer)
        patches = self._find_patches(input_ids, image_index)
        length = input_ids.shape[1]
        tokens = torch.cat([input_ids, answer], dim=1)
        mask = None if attention_mask is None else F.pad(attention_mask, (0, answer.shape[1]), value=1)

        def forward(places: slice, **kwargs):
            seen = None if mask is None else mask[:, : places.stop]
            return self.model(tokens[:, places], attention_mask=seen, use_cache=True, **kwargs)

        cache = DynamicCache(config=self.config)
        forward(slice(0, length - 1), image_features=image_features, only_last=True, **{CACHE_NAME: cache})
        rows = []
        with self._eager_attention():
            for place in range(length - 1, tokens.shape[1] - 1):
                output = forward(slice(place, place + 1), output_attentions=True, **{CACHE_NAME: cache})
                rows.append(torch.stack([_read(weights, patches, place + 1) for weights in output.attentions]))
        return torch.stack(rows)

    @staticmethod
    def cross_layer_difference(maps: torch.Tensor) -> torch.Tensor:
        """
        How much the picture of attention changes from layer to layer (Figure 7).

        The paper shows the curves; no formula for them was found in its published pages or code, so this is our reading.
        With `a[l, h, p]` the attention of head `h` of layer `l` on patch `p`, a layer's picture is the mean of its heads as
        a distribution over the image, `m[l, p] = sum_h a[l, h, p] / sum_hp a[l, h, p]`, and the difference of neighbouring
        layers is the total variation distance `d[l] = 1/2 sum_p |m[l + 1, p] - m[l, p]|`: the share of the attention that
        lies on other patches. How much a layer looks at the image at all does not count, only where.

        Args:
            maps (`torch.Tensor` of shape `(..., layers, heads, patches)`): as [`attend_to_image`] gives them.

        Returns:
            `torch.FloatTensor` of shape `(..., layers - 1)`: in `[0, 1]`, 0 for pictures that are alike, 1 for pictures
            without a patch in common.

        Raises:
            ValueError: for a layer without any attention on the image, or less than two layers.
        """
        if maps.shape[-3] < 2:
            raise ValueError(f"maps has {maps.shape[-3]} layers; a difference between layers needs at least 2.")
        pictures = _as_distributions(maps.float().mean(dim=-2))  # (..., layers, patches)
        return pictures.diff(dim=-2).abs().sum(dim=-1) / 2

    @staticmethod
    def inner_layer_difference(maps: torch.Tensor) -> torch.Tensor:
        """
        How much the heads of one layer differ (Figure 7).

        As for [`cross_layer_difference`], no formula was found, and this is our reading. With each head's attention as a
        distribution over the image, `m[l, h, p] = a[l, h, p] / sum_p a[l, h, p]`, it is the mean over all pairs of heads
        `g < h` of the total variation distance `1/2 sum_p |m[l, g, p] - m[l, h, p]|`.

        Args:
            maps (`torch.Tensor` of shape `(..., layers, heads, patches)`): as [`attend_to_image`] gives them.

        Returns:
            `torch.FloatTensor` of shape `(..., layers)`: in `[0, 1]`.

        Raises:
            ValueError: for a head without any attention on the image, or less than two heads.
        """
        heads = maps.shape[-2]
        if heads < 2:
            raise ValueError(f"maps has {heads} heads; a difference between heads needs at least 2.")
        pictures = _as_distributions(maps.float())
        distances = torch.cdist(pictures, pictures, p=1) / 2  # (..., layers, heads, heads), 0 on the diagonal
        return distances.sum(dim=(-2, -1)) / (heads * (heads - 1))

    def _check_question(self, input_ids, attention_mask, answer):
        if input_ids.ndim != 2 or len(input_ids) != 1:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; attend_to_image takes one row, (1, length). "
                "Call it once for each row of a batch."
            )
        if answer.shape[1] == 0:
            raise ValueError("answer_ids is empty; pass the ids of at least one token that the model wrote.")
        if input_ids[0, -1] == self.config.eoi_token_id:
            raise ValueError(
                "The prompt ends in EOI, which predicts nothing; end it after the newline that follows an image."
            )
        if attention_mask is not None and not attention_mask[0, -1]:
            raise ValueError("attention_mask ends in 0; the answer follows the prompt, so pad on the left.")

    def _find_patches(self, input_ids, image_index):
        """Places of the patches of one image in the row, `(patches,)`."""
        featured = find_image_blocks(input_ids, self.config).featured[0]
        images = featured.nonzero().view(-1, self.config.num_patches)
        if not 0 <= image_index < len(images):
            raise ValueError(f"image_index is {image_index}, but the prompt has {len(images)} whole images.")
        return images[image_index]

    @contextmanager
    def _eager_attention(self) -> Iterator[None]:
        configs = self.config, self.config.text_config  # the LLM's may differ from the model's
        before = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation = "eager"
            yield
        finally:
            for config, implementation in zip(configs, before):
                config._attn_implementation = implementation


def _read(weights: torch.Tensor, patches: torch.Tensor, length: int) -> torch.Tensor:
    """Of one row of weights `(1, heads, 1, keys)` those on the patches: `(heads, patches)`. A window has the last keys."""
    row = F.pad(weights[0, :, 0].float(), (length - weights.shape[-1], 0))  # (heads, length)
    return row[:, patches.to(row.device)].to(patches.device)


def _as_distributions(maps: torch.Tensor) -> torch.Tensor:
    """Maps `(..., patches)` that sum to 1."""
    total = maps.sum(dim=-1, keepdim=True)
    if not (total > 0).all():
        raise ValueError(
            "A map is zero on the whole image (or not a number), so there is no picture to compare. Is the image outside "
            "of a sliding window?"
        )
    return maps / total
