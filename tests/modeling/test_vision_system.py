"""The vision system apart from its language model: what is saved, that it comes back whole, what does not fit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_libra import LibraForCausalLM
from modeling_libra.vision_system_libra import (
    fresh_vision_system,
    load_vision_system,
    replace_vision_system,
    save_vision_system,
)
from tests.modeling.toys import FAMILIES, make_config, make_features, make_rows, pad, randomize

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_llm(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **text) -> Path:
    """A random language model as a repository of its own."""
    model = AutoModelForCausalLM.from_config(make_config(family, text).text_config)
    randomize(model, seed).to(dtype).save_pretrained(folder)
    return folder


def make_libra(llm: Path, family: str = "llama", seed: int = 5, text: dict | None = None, **fields) -> LibraForCausalLM:
    """A Libra on this language model, with a vision system of random values."""
    config = make_config(family, text, **fields)
    config.dtype = AutoConfig.from_pretrained(llm).dtype
    model = fresh_vision_system(llm, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision" in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(std=0.2, generator=generator))
    return model


def assert_same_model(actual: LibraForCausalLM, expected: LibraForCausalLM) -> None:
    weights = expected.state_dict()
    assert actual.state_dict().keys() == weights.keys()
    for name, weight in actual.state_dict().items():
        assert weight.dtype == weights[name].dtype, name
        assert torch.equal(weight, weights[name]), name
    ids, mask = pad(make_rows(expected.config))
    features = make_features(expected.config, 3).to(expected.dtype)
    with torch.no_grad():
        mine, theirs = (m(ids, attention_mask=mask, image_features=features) for m in (actual, expected))
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.vision_logits, theirs.vision_logits)


@pytest.fixture
def saved(tmp_path) -> SimpleNamespace:
    """A language model, a Libra on it, and the Libra's vision system on its own."""
    llm = make_llm(tmp_path / "llm")
    model = make_libra(llm)
    save_vision_system(model, tmp_path / "vision", llm)
    return SimpleNamespace(llm=llm, model=model, vision=tmp_path / "vision", tmp=tmp_path)


# ---- fresh ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_vision_system_leaves_the_language_model_alone(tied, dtype, tmp_path):
    llm = make_llm(tmp_path / "llm", dtype=dtype, tie_word_embeddings=tied)
    model = fresh_vision_system(llm, make_config(text={"tie_word_embeddings": tied}))
    bare = AutoModelForCausalLM.from_pretrained(llm)
    assert model.dtype == dtype
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    for name, weight in bare.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name.replace("model.", "model.language_model.", 1)]), name
    for name, weight in model.state_dict().items():
        if "vision" in name:
            starts_at_zero = "bridge" in name and name.endswith("B.weight")
            assert weight.isfinite().all(), name
            assert weight.any() != starts_at_zero, name


def test_saving_a_fresh_libra_uses_its_own_names(tmp_path):
    model = fresh_vision_system(make_llm(tmp_path / "llm"), make_config())
    model.save_pretrained(tmp_path / "libra")
    assert load_file(tmp_path / "libra" / "model.safetensors").keys() == model.state_dict().keys()


# ---- there and back ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, dtype, tmp_path):
    llm = make_llm(tmp_path / "llm", family, dtype)
    model = make_libra(llm, family)
    save_vision_system(model, tmp_path / "vision", llm)
    loaded = load_vision_system(tmp_path / "vision")
    assert_same_model(loaded, model)
    assert not loaded.training
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


def test_tied_embeddings(tmp_path):
    tied = {"tie_word_embeddings": True}
    llm = make_llm(tmp_path / "llm", **tied)
    model = make_libra(llm, text=tied)
    save_vision_system(model, tmp_path / "vision", llm)
    loaded = load_vision_system(tmp_path / "vision")
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert_same_model(loaded, model)


@pytest.mark.parametrize("part", ["use_bridge", "use_expert", "use_continuous_features"])
def test_there_and_back_without_a_part(part, tmp_path):
    llm = make_llm(tmp_path / "llm")
    model = make_libra(llm, **{part: False})
    save_vision_system(model, tmp_path / "vision", llm)
    assert_same_model(load_vision_system(tmp_path / "vision"), model)


def test_only_the_vision_system_is_saved(saved):
    weights = load_file(saved.vision / "vision_system.safetensors")
    assert weights.keys() == {name for name in saved.model.state_dict() if "vision" in name}
    assert {path.name for path in saved.vision.iterdir()} == {
        "config.json",
        "generation_config.json",
        "vision_system.json",
        "vision_system.safetensors",
    }
    description = json.loads((saved.vision / "vision_system.json").read_text())
    assert description["base_llm"] == str(saved.llm)
    assert (description["sizes"]["model_type"], description["sizes"]["hidden_size"]) == ("llama", 32)


def test_a_vision_system_is_not_taken_for_a_whole_model(saved):
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LibraForCausalLM.from_pretrained(saved.vision)


def test_shards_and_saving_again(saved):
    save_vision_system(saved.model, saved.vision, saved.llm, max_shard_size="30kB")
    assert len(list(saved.vision.glob("vision_system-*.safetensors"))) == 2
    assert not (saved.vision / "vision_system.safetensors").exists()
    assert_same_model(load_vision_system(saved.vision), saved.model)
    save_vision_system(saved.model, saved.vision, saved.llm)
    assert [path.name for path in saved.vision.glob("*safetensors*")] == ["vision_system.safetensors"]


def test_the_language_model_elsewhere(saved):
    shutil.move(saved.llm, saved.tmp / "moved")
    with pytest.raises(OSError, match=r"The base LLM .* cannot be read: .* Pass base_llm with a folder or Hub id"):
        load_vision_system(saved.vision)
    assert_same_model(load_vision_system(saved.vision, base_llm=saved.tmp / "moved"), saved.model)


def test_both_from_the_hub(saved, monkeypatch):
    """From the Hub's cache, without a network; the language model in shards."""
    hub = saved.tmp / "hub"
    AutoModelForCausalLM.from_pretrained(saved.llm).save_pretrained(saved.tmp / "shards", max_shard_size="20kB")
    for name, folder in (("llm", saved.tmp / "shards"), ("vision", saved.vision)):
        cached = hub / f"models--libra-team--{name}"
        shutil.copytree(folder, cached / "snapshots" / COMMIT)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same_model(load_vision_system("libra-team/vision", base_llm="libra-team/llm"), saved.model)


def test_options_reach_from_pretrained(saved):
    model = load_vision_system(saved.vision, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_after_training_steps_with_a_frozen_language_model(saved):
    model = saved.model.train()
    trained = [parameter.requires_grad_("vision" in name) for name, parameter in model.named_parameters()]
    optimizer = torch.optim.AdamW([parameter for parameter in trained if parameter.requires_grad], lr=1e-2)
    ids, mask = pad(make_rows(model.config), "right")
    features = make_features(model.config, 3)
    for _ in range(2):
        labels = ids.masked_fill(mask == 0, -100)
        model(ids, attention_mask=mask, image_features=features, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_vision_system(model, saved.tmp / "trained", saved.llm)
    assert_same_model(load_vision_system(saved.tmp / "trained"), model.eval())


# ---- onto a model that is there ----


def test_replacing_a_vision_system(saved):
    other = make_libra(saved.llm, seed=9)
    replace_vision_system(other, saved.vision)
    assert_same_model(other, saved.model)


def test_replacing_keeps_the_language_model_and_the_dtype(saved):
    llm = make_llm(saved.tmp / "other", dtype=torch.bfloat16, seed=4)  # the same sizes, other weights
    model = make_libra(llm)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    replace_vision_system(model, saved.vision)
    expected = saved.model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].bfloat16() if "vision" in name else before[name]), name


@pytest.mark.parametrize(
    ("sizes", "fields", "message"),
    [
        ({"num_hidden_layers": 3}, {}, r"num_hidden_layers 3 \(expected 2\)"),
        ({}, {"image_grid": 3}, r"image_grid 3 \(expected 2\)"),
        ({}, {"use_bridge": False}, r"use_bridge False \(expected True\)"),
        ({}, {"use_expert": False}, r"use_expert False \(expected True\)"),
        ({}, {"use_continuous_features": False}, r"use_continuous_features False \(expected True\)"),
        ({"head_dim": 12}, {}, r"q_proj\.A\.weight is \(8, 32\), expected \(12, 32\)"),
    ],
)
def test_replacing_what_does_not_fit(saved, sizes, fields, message):
    model = make_libra(make_llm(saved.tmp / "other", **sizes), text=sizes, **fields)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        replace_vision_system(model, saved.vision)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# ---- what is refused ----


def test_a_trained_language_model_is_not_saved_away(saved):
    with torch.no_grad():
        saved.model.model.language_model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight differ from it\. Was it trained\?"):
        save_vision_system(saved.model, saved.tmp / "again", saved.llm)
    assert not (saved.tmp / "again").exists()


def test_base_of_other_sizes_when_saving(saved):
    other = make_llm(saved.tmp / "other", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"unknown: model\.language_model\.layers\.2\."):
        save_vision_system(saved.model, saved.tmp / "again", other)


def test_parameters_of_several_dtypes(saved):
    saved.model.model.language_model.bfloat16()
    with pytest.raises(ValueError, match=r"parameters in torch\.bfloat16, torch\.float32"):
        save_vision_system(saved.model, saved.tmp / "again", saved.llm)


def test_adapters_are_to_be_merged_first(saved):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"]), saved.model)
    with pytest.raises(ValueError, match=r"unknown: .*lora_A"):
        save_vision_system(saved.model, saved.tmp / "again", saved.llm)


def test_another_language_model_of_these_sizes(saved):
    other = make_llm(saved.tmp / "other", seed=4)
    with pytest.raises(ValueError, match=r"other are not those of the language model that the vision system"):
        load_vision_system(saved.vision, base_llm=other)


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_a_language_model_of_other_sizes(saved, family):
    other = make_llm(saved.tmp / "other", family, intermediate_size=64)
    found = r"intermediate_size 64 \(expected 48\)"
    expected = found if family == "llama" else r"model_type mistral \(expected llama\), " + found
    with pytest.raises(ValueError, match="does not fit .*, which has " + expected):
        load_vision_system(saved.vision, base_llm=other)


def test_missing_and_unknown_weights(saved):
    path = saved.vision / "vision_system.safetensors"
    weights = load_file(path)
    weights["vision_lm_head.7.weight"] = weights.pop("vision_lm_head.1.weight")
    save_file(weights, path, metadata={"format": "pt"})
    message = r"missing: vision_lm_head\.1\.weight; unknown: vision_lm_head\.7\.weight"
    with pytest.raises(ValueError, match=message):
        load_vision_system(saved.vision)
    with pytest.raises(ValueError, match=message):
        replace_vision_system(saved.model, saved.vision)
    path.unlink()
    with pytest.raises(ValueError, match=r"has neither vision_system\.safetensors\.index\.json nor"):
        load_vision_system(saved.vision)


def test_what_is_no_vision_system(saved):
    with pytest.raises(ValueError, match=r"is no vision system: it has no vision_system\.json"):
        load_vision_system(saved.llm)


def test_a_language_model_without_safetensors(saved):
    (saved.llm / "model.safetensors").unlink()
    with pytest.raises(OSError, match="A language model in safetensors is expected"):
        load_vision_system(saved.vision)


def test_methods_of_the_model(tmp_path):
    """What a model loaded as remote code has in place of the functions."""
    llm = make_llm(tmp_path / "llm")
    model, other = make_libra(llm, seed=1), make_libra(llm, seed=2)
    model.save_vision_system(tmp_path / "vision", llm)
    other.load_vision_system(tmp_path / "vision")
    assert_same_model(other, model)
