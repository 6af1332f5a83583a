"""Small language models and CLIPs as folders, in the layout of their own repositories: what `libra init` starts from."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN_IDS = {"bos_token_id": None, "eos_token_id": 257, "pad_token_id": 258}

# Each family that Libra routes, with what sets it apart.
FAMILIES = {
    "llama": {"attention_bias": True, "num_key_value_heads": 4},
    "mistral": {"sliding_window": 6},
    "qwen2": QWEN_IDS | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4},
    "qwen3": QWEN_IDS | {"head_dim": 16},
}

CLIP_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

# A small decoder and quantizer; `libra init` takes those of the release.
TOKENIZER_FIELDS = {
    "embed_dim": 16,
    "codebook_size": 16,
    "z_channels": 16,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 0,
    "num_attn_heads": 1,
}


def make_qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen's: bytes, two newlines merged, no token at the beginning, a chat template of its own."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    newline = bytes_to_unicode()[ord("\n")]
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary | {newline * 2: 256}, merges=[(newline, newline)], eos_token="<|im_end|>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def make_llm(folder: Path, family: str, golden: Path, dtype: torch.dtype = torch.float32, **overrides) -> Path:
    """A random causal language model with its tokenizer. Every weight matters: norms are no ones, biases no zeros."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family] | overrides)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    if family.startswith("qwen"):
        make_qwen_tokenizer().save_pretrained(folder)
    else:
        AutoTokenizer.from_pretrained(golden / "official_checkpoint" / "checkpoint").save_pretrained(folder)
    return folder


def make_clip(folder: Path, image_processor: dict | None = None, **sizes) -> Path:
    """A random CLIP, whole as OpenAI's repositories have it, with the settings of its image processor."""
    torch.manual_seed(8)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(vision_config=CLIP_SIZES | sizes, text_config=text | ids)
    CLIPModel(config).save_pretrained(folder)
    side = config.vision_config.image_size
    settings = image_processor or {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    content = {"image_processor_type": "CLIPImageProcessor", **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
