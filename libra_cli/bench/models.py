"""Models with random weights, made in seconds, and prompts for them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from modeling_libra import LibraConfig, LibraForCausalLM

from .settings import BenchSettings, Shape

BOS, NEWLINE = 1, 13
WEIGHT_STD = 0.02


class Prompt(NamedTuple):
    """
    One prompt.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, length)`): flat ids.
        image_features (`torch.FloatTensor` of shape `(images, patches, feature_size)` or `None`): of its images.
    """

    input_ids: torch.Tensor
    image_features: torch.Tensor | None


def libra_config(settings: BenchSettings, shape: Shape) -> LibraConfig:
    """The configuration of the Libra that is measured; its `text_config` is that of the bare language model."""
    text = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=max(settings.num_tokens, settings.memory_tokens) + 1,
    )
    return LibraConfig(
        text_config=text,
        image_grid=settings.image_grid,
        feature_size=settings.feature_size,
        newline_token_id=NEWLINE,
    )


def build_libra(settings: BenchSettings, shape: Shape) -> LibraForCausalLM:
    """A Libra in evaluation mode, float32, on sdpa."""
    with no_init_weights():
        model = LibraForCausalLM(libra_config(settings, shape))
    return _ready(model, settings.seed)


def build_llama(settings: BenchSettings, shape: Shape) -> LlamaForCausalLM:
    """The bare language model of the same dimensions, in evaluation mode, float32, on sdpa."""
    with no_init_weights():
        model = LlamaForCausalLM(libra_config(settings, shape).text_config)
    return _ready(model, settings.seed)


def _ready(model, seed):
    fill_weights(model, seed)
    model.set_attn_implementation("sdpa")
    return model.eval()


@torch.no_grad()
def fill_weights(model: nn.Module, seed: int) -> None:
    """Gives matrices small random values (the bridge's B too, so that it matters) and norms ones, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=WEIGHT_STD, generator=generator)


def build_prompt(config: LibraConfig, text_lengths: Sequence[int], seed: int) -> Prompt:
    """
    Text, image, text, ..., text: one image between any two pieces of text. BOS is first, a newline after each image.

    Args:
        config ([`LibraConfig`]): names the ids.
        text_lengths (`Sequence` of `int`): tokens of each piece, at least 1; one piece means no image.
        seed (`int`): of words, codes and features.

    Returns:
        [`Prompt`]
    """
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for place, length in enumerate(text_lengths):
        text = torch.randint(config.text_vocab_size, (length,), generator=generator)
        text[0] = NEWLINE if place else BOS
        if place:
            codes = torch.randint(config.num_image_codes, (config.num_patches,), generator=generator)
            codes = codes + config.text_vocab_size
            pieces += [torch.tensor([config.boi_token_id]), codes, torch.tensor([config.eoi_token_id])]
        pieces.append(text)
    images = len(text_lengths) - 1
    features = torch.randn(images, config.num_patches, config.feature_size, generator=generator) if images else None
    return Prompt(torch.cat(pieces)[None], features)


def split_evenly(total: int, pieces: int) -> list[int]:
    """`total` as a sum of `pieces` numbers that differ by at most one, the larger ones first."""
    share, rest = divmod(total, pieces)
    return [share + (place < rest) for place in range(pieces)]
