"""What a cache of transformers holds for Libra.

Its own layers hold the language view of keys and values, as large as the bare LLM's: all that writing text needs. The
vision view differs from it by the bridge's terms, which are of low rank: for each token and layer the cache also
remembers the bridge's latents (`2 * bridge_rank` numbers), and for each token its position and its modality. They live
in further layers of the same cache, so whatever is done to the cache (crop, reorder, reset, repeat) is done to them.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What a cache is called in calls and outputs of transformers: `cache` from 5.24 on, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """
    The cache a caller passed, under either of its two names.

    Args:
        cache (`Cache`, *optional*): its name from transformers 5.24 on.
        past_key_values (`Cache`, *optional*): its name before.

    Returns:
        `Cache` or `None`: the one that was passed.

    Raises:
        ValueError: if both were passed.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("Both `cache` and `past_key_values` were passed; they are two names of one thing: pass one.")
    return past_key_values if cache is None else cache


class BridgeMemory:
    """
    Reads and writes the bridge's part of a cache. Made anew in each forward; it keeps nothing itself but what this
    forward stored.

    The layers of the cache are: one for each layer of the LLM (the language view), one for each of these (latents of
    keys, latents of values), one for each kind of layer, sliding or not (positions, modalities).

    Args:
        cache (`Cache`): any cache of transformers, empty or filled by Libra.
        layer_types (`list[str]`): the kind of each layer of the LLM.

    Raises:
        ValueError: if the cache holds tokens without their latents, as one filled by the bare LLM does.
    """

    def __init__(self, cache: Cache, layer_types: list[str]):
        self.cache = cache
        self.layer_types = layer_types
        kinds = sorted(set(layer_types))
        self.places_index = {kind: 2 * len(layer_types) + i for i, kind in enumerate(kinds)}
        self.tokens: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rotary: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of all keys, when the vision view is rebuilt
        own_layers = [cache.layers[i] if i < len(cache.layers) else DynamicLayer() for i in range(len(layer_types))]
        wanted = own_layers + own_layers + [own_layers[layer_types.index(kind)] for kind in kinds]
        for index in range(len(cache.layers), len(wanted)):
            cache.layers.append(DynamicLayer() if index < len(layer_types) else _like(wanted[index]))
        if (
            torch.compiler.is_compiling()
        ):  # lengths are tensors then, and this a step of a cache that was checked before
            return
        filled, remembered = (int(cache.get_seq_length(i)) for i in (0, self.places_index[layer_types[0]]))
        if filled != remembered:
            raise ValueError(
                f"The cache holds {filled} tokens, but the bridge's latents of {remembered}. Was it filled by "
                "another model, or cropped layer by layer? Fill it with this one, or start with an empty cache."
            )

    def open_tokens(self, num_patches: int) -> torch.Tensor | None:
        """
        How much of an unfinished image the cache ends in.

        Args:
            num_patches (`int`): codes of an image.

        Returns:
            `torch.LongTensor` of shape `(batch,)`: tokens of that image, BOI among them; 0 where a row ends in text. None
            for an empty cache, and one that forgets.
        """
        places = [index for index in self.places_index.values() if not self.cache.layers[index].is_sliding]
        filled = int(self.cache.get_seq_length(0))
        if not places or filled == 0:
            return None
        is_vision = self.cache.layers[places[0]].values[:, 0, :filled, 0].bool()  # (batch, filled)
        trailing = is_vision.flip(1).int().cummin(dim=1).values.sum(dim=1)  # (batch,), whole images among them
        return trailing % (num_patches + 2)

    def remember_tokens(self, position_ids: torch.Tensor, is_vision: torch.Tensor) -> None:
        """
        Stores the tokens of this forward.

        Args:
            position_ids (`torch.LongTensor` of shape `(batch or 1, length)`): as RoPE takes them.
            is_vision (`torch.BoolTensor` of shape `(batch, length)`): their modality.
        """
        positions = position_ids.expand_as(is_vision).int()[:, None, :, None]  # (batch, 1, length, 1)
        modalities = is_vision.int()[:, None, :, None]
        for kind, index in self.places_index.items():
            self.tokens[kind] = self.cache.update(positions, modalities, index)

    def remember_latents(
        self, layer_idx: int, key_latents: torch.Tensor, value_latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Stores the latents of this forward in one layer.

        Args:
            layer_idx (`int`): of the LLM.
            key_latents, value_latents (`torch.Tensor` of shape `(batch, length, bridge_rank)`).

        Returns:
            `tuple` of two `torch.Tensor` of shape `(batch, keys, bridge_rank)`: those of all tokens whose keys this
            layer gives.
        """
        index = len(self.layer_types) + layer_idx
        latents = self.cache.update(key_latents[:, None], value_latents[:, None], index)
        return latents[0][:, 0], latents[1][:, 0]

    def positions(self, kind: str) -> torch.Tensor:
        """Positions of all tokens whose keys layers of this kind give, `(batch, keys)`."""
        return self.tokens[kind][0][:, 0, :, 0]

    def is_vision(self, kind: str) -> torch.Tensor:
        """Their modality, `torch.BoolTensor` of shape `(batch, keys)`."""
        return self.tokens[kind][1][:, 0, :, 0].bool()


def _like(layer: Any) -> Any:
    """An empty layer that grows, slides or stays like another. Quantization is not worth it at this size."""
    if layer.is_compileable:
        return type(layer)(max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len)
    if layer.is_sliding:
        return type(layer)(sliding_window=layer.sliding_window)
    return DynamicLayer()
