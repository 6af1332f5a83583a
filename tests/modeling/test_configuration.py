"""LibraConfig: the defaults are the release, sizes that cannot work are refused, files round-trip."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import MistralConfig

from modeling_libra import LibraConfig, LibraForCausalLM
from tests.modeling.toys import FAMILIES, TEXT, make_config


def test_defaults_are_the_release():
    config, text = LibraConfig(), LibraConfig().text_config
    assert (config.image_grid, config.num_patches, config.feature_size) == (24, 576, 4096)
    assert (config.num_codebooks, config.codebook_size, config.num_image_codes) == (2, 512, 2**18)
    assert (config.expert_down_ratio, config.bridge_rank, config.use_bridge) == (4, 8, True)
    assert (text.model_type, text.vocab_size, text.hidden_size, text.num_hidden_layers) == ("llama", 32000, 4096, 32)
    assert (text.intermediate_size, text.num_attention_heads, text.num_key_value_heads) == (11008, 32, 32)
    assert (text.rms_norm_eps, text.max_position_embeddings, config.newline_token_id) == (1e-6, 2048, 13)


def test_flat_id_space():
    config = make_config()
    assert config.text_vocab_size == 50
    assert config.num_image_codes == 36
    assert (config.boi_token_id, config.eoi_token_id, config.total_vocab_size) == (86, 87, 88)


def test_parameters_of_the_release():
    with torch.device("meta"):
        model = LibraForCausalLM(LibraConfig())
    vision = sum(p.numel() for name, p in model.named_parameters() if "vision" in name)
    total = sum(p.numel() for p in model.parameters())
    assert vision == pytest.approx(4.28e9, abs=0.005e9)  # "4B" in the paper
    assert total - vision == 6_738_415_616  # LLaMA-2-7B
    assert total == pytest.approx(11.0e9, abs=0.05e9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_config": {"model_type": "gpt2"}}, r"model_type is 'gpt2'.*llama, mistral, qwen2, qwen3"),
        ({"image_grid": 0}, "image_grid must be at least 1, found 0"),
        ({"num_codebooks": 0}, "num_codebooks must be at least 1, found 0"),
        ({"codebook_size": -1}, "codebook_size must be at least 1, found -1"),
        ({"feature_size": 0}, "feature_size must be at least 1"),
        ({"expert_down_ratio": 0}, "expert_down_ratio must be at least 1"),
        ({"bridge_rank": 0}, "bridge_rank must be at least 1"),
        ({"num_codebooks": 3}, r"hidden_size \(32\) must be a multiple of num_codebooks \(3\)"),
        ({"expert_down_ratio": 17}, r"expert_down_ratio \(17\) leaves a map with 16 outputs rank 0"),
        ({"newline_token_id": 50}, r"newline_token_id \(50\) must be a text id, in \[0, 50\)"),
        ({"newline_token_id": -1}, r"newline_token_id \(-1\) must be a text id"),
    ],
)
def test_sizes_that_cannot_work(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=f"(?s)ValueError: .*{message}"):
        LibraConfig(**{"text_config": TEXT, **overrides})


def test_wrong_type():
    with pytest.raises(StrictDataclassFieldValidationError, match="image_grid"):
        make_config(image_grid="24")


@pytest.mark.parametrize("family", FAMILIES)
def test_file_round_trip(family, tmp_path):
    config = make_config(family, use_bridge=False, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    loaded = LibraConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.text_config) is type(config.text_config)


def test_text_config_may_be_a_config():
    config = LibraConfig(text_config=MistralConfig(vocab_size=77))
    assert config.boi_token_id == 77 + 2**18


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_decides_on_tying(tied):
    config = make_config(text={"tie_word_embeddings": tied}, tie_word_embeddings=not tied)
    assert config.tie_word_embeddings is tied
