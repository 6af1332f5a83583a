"""A tiny untrained image tokenizer, the released tiny checkpoint, and a processor made of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from processing.conversion_libra_image_tokenizer import load_released
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from processing.processing_libra import LibraProcessor

TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TINY_TOKENIZER = {
    "select_layers": [1, 3],
    "embed_dim": 16,
    "num_codebooks": 2,
    "codebook_size": 16,
    "z_channels": 16,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "num_attn_heads": 4,
    "resolution": 32,
}


def make_image_tokenizer(**overrides) -> LibraImageTokenizer:
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP))
    return LibraImageTokenizer.from_clip(clip, **{**TINY_TOKENIZER, **overrides}).eval()


@pytest.fixture
def image_tokenizer() -> LibraImageTokenizer:
    return make_image_tokenizer()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def release(golden) -> SimpleNamespace:
    """The released tiny checkpoint, what it must give, and what conversion makes of its image tokenizer."""
    folder = golden / "official_checkpoint"
    image_tokenizer, image_processor = load_released(folder / "checkpoint")
    return SimpleNamespace(
        folder=folder / "checkpoint",
        images=[str(folder / "image_0.png"), str(folder / "image_1.png")],
        tensors=load_file(folder / "expected.safetensors"),
        **json.loads((folder / "expected.json").read_text()),
        image_tokenizer=image_tokenizer,
        image_processor=image_processor,
    )


@pytest.fixture
def processor(release) -> LibraProcessor:
    """A processor around the released tiny tokenizers: 360 text ids, 4 x 4 patches of 512 * 512 codes."""
    tokenizer = AutoTokenizer.from_pretrained(release.folder)
    return LibraProcessor(release.image_processor, tokenizer, release.image_tokenizer)
