"""Toy models and id sequences for the tests of the model: 36 image codes, images of 4 patches, 50 text ids."""

import torch

from modeling_libra import LibraConfig, LibraForCausalLM

NEWLINE = 13
TEXT = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Every shape of language model that can be routed, with what sets it apart from a plain Llama.
FAMILIES = {
    "llama": {},
    "llama_biased": {"attention_bias": True, "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
# Every family on the kernel people run, and a plain Llama on the other.
FAMILIES_AND_KERNELS = [*((family, "sdpa") for family in FAMILIES), ("llama", "eager")]


def make_config(family: str = "llama", text: dict | None = None, **overrides) -> LibraConfig:
    """A toy configuration; `text` overrides its language model, `overrides` the rest."""
    sizes = {"image_grid": 2, "codebook_size": 6, "feature_size": 10, "bridge_rank": 3, "newline_token_id": NEWLINE}
    return LibraConfig(text_config=TEXT | FAMILIES[family] | (text or {}), **sizes | overrides)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter a random value of use (none is zero, the bridge included), so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def make_model(config: LibraConfig | None = None, attention: str = "sdpa", seed: int = 0) -> LibraForCausalLM:
    """A toy model in evaluation mode."""
    model = LibraForCausalLM(make_config() if config is None else config).eval()
    model.set_attn_implementation(attention)
    return randomize(model, seed)


def make_image(config: LibraConfig, seed: int = 0) -> list[int]:
    """The ids of one image: BOI, random codes, EOI."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.num_image_codes, (config.num_patches,), generator=generator) + config.text_vocab_size
    return [config.boi_token_id, *codes.tolist(), config.eoi_token_id]


def make_features(config: LibraConfig, images: int, seed: int = 0) -> torch.Tensor:
    """Features of `images` images: `(images, patches, feature_size)`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(images, config.num_patches, config.feature_size, generator=generator)


def make_rows(config: LibraConfig) -> list[list[int]]:
    """Three rows of different lengths: two images, no image, one image."""
    return [
        [1, 5, *make_image(config, 0), NEWLINE, 21, 22, *make_image(config, 1), NEWLINE, 31],
        [1, 6, 7, 8, 9],
        [1, *make_image(config, 2), NEWLINE, 41, 42, 43],
    ]


def pad(rows: list[list[int]], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `(rows, longest)` of rows of any lengths, padded with the text id 0."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding = [0] * (longest - len(row))
        keep = [1] * len(row)
        ids.append(padding + row if side == "left" else row + padding)
        mask.append(padding + keep if side == "left" else keep + padding)
    return torch.tensor(ids), torch.tensor(mask)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance`; infinities must be at the same places."""
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=0)
