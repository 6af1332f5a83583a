"""Names and options of the released layout."""

import json

import pytest
import torch

from modeling_libra.conversion_libra import convert_config, convert_key, convert_state_dict


@pytest.fixture
def released_config(golden):
    return json.loads((golden / "lm" / "config.json").read_text())


def test_config(released_config):
    config = convert_config(released_config)
    assert (config.text_config.model_type, config.text_vocab_size, config.text_config.hidden_size) == ("llama", 97, 64)
    assert (config.image_grid, config.codebook_size, config.feature_size) == (4, 32, 48)
    assert (config.bridge_rank, config.use_bridge, config.newline_token_id) == (8, True, 13)
    assert config.text_config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("vision_prediction_mode", "2d"),
        ("use_2d_rope", True),
        ("unified_head", True),
        ("addition_mode", True),
        ("use_vision_position_embedding", True),
        ("concat_signals", False),
        ("norm_signals", False),
    ],
)
def test_options_no_published_weights_use(released_config, option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r}; only"):
        convert_config(released_config | {option: value})


def test_missing_fields(released_config):
    del released_config["vision_vocab_size"], released_config["hidden_size"]
    with pytest.raises(ValueError, match="lacks hidden_size, vision_vocab_size"):
        convert_config(released_config)


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.layers.31.self_attn.q_proj.weight", "model.language_model.layers.31.self_attn.q_proj.weight"),
        (
            "model.layers.0.self_attn.vision_k_bridge_on_language.weight_B",
            "model.vision_model.layers.0.self_attn.k_bridge_on_language.B.weight",
        ),
        ("model.layers.2.vision_input_layernorm.weight", "model.vision_model.layers.2.input_layernorm.weight"),
        ("vision_lm_head.heads.1.weight", "vision_lm_head.1.weight"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.vision_placeholder", None),
    ],
)
def test_names(released, ours):
    assert convert_key(released) == ours


def test_unknown_names_are_all_named():
    weights = {name: torch.zeros(1) for name in ("lm_head.weight", "model.layers.0.extra.weight", "model.other.bias")}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra\.weight, model\.other\.bias"):
        convert_state_dict(weights)
    with pytest.raises(ValueError, match=r"Unknown parameter 'model\.other\.bias'"):
        convert_key("model.other.bias")
