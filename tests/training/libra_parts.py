"""An untrained language model and an untrained image tokenizer, made of the world's text: what pretraining starts from."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from training import train_llm

LLM = """
model_config: {vocab_size: 800, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
train_documents: 200
eval_documents: 8
tokenizer_documents: 200
block_size: 64
eval_prompts: 2
max_steps: 1
per_device_train_batch_size: 2
report_to: none
use_cpu: true
disable_tqdm: true
"""

SMALL_TOKENIZER = {
    "select_layers": [1, 2],
    "embed_dim": 16,
    "codebook_size": 16,
    "z_channels": 32,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 0,
    "attn_resolutions": [],
    "num_attn_heads": 1,
    "resolution": 48,
}
"""Fields of a `LibraImageTokenizerConfig` around a CLIP of two layers for images of 48 pixels."""


def make_parts(folder: Path) -> Path:
    """Writes both into the folders `llm` and `image_tokenizer`."""
    (folder / "llm.yaml").write_text(LLM)
    train_llm.main(["--config", str(folder / "llm.yaml"), "--output_dir", str(folder / "llm")])
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    tokenizer = LibraImageTokenizer.from_clip(CLIPVisionModel(config), **SMALL_TOKENIZER)
    tokenizer.save_pretrained(folder / "image_tokenizer")
    LibraImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(
        folder / "image_tokenizer"
    )
    return folder
