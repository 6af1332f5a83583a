"""The folders of `hub_configs/`: configurations that are what they say, model cards that the Hub accepts."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoImageProcessor, GenerationConfig

from libra_cli.cards import model_card
from libra_cli.export import AUTO_MAP, CUSTOM_PIPELINES, remote_code_files
from modeling_libra import LibraConfig
from processing.chat_template_libra import CHAT_TEMPLATE
from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig

HUB_CONFIGS = Path(__file__).resolve().parents[2] / "hub_configs"
FOLDERS = sorted(path for path in HUB_CONFIGS.iterdir() if path.is_dir())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def test_card_has_valid_metadata(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.license == ("llama2" if "11b" in folder.name else "apache-2.0")
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.language
    # whatever results the card reports must survive the Hub's own reading of them
    front_matter = yaml.safe_load(text.split("---")[1])
    reported = [r for model in front_matter.get("model-index", []) for r in model["results"]]
    metrics = [metric for result in reported for metric in result["metrics"]]
    assert len(data.eval_results or []) == len(metrics)


def test_code_is_that_of_the_source(folder):
    advice = f"run `libra update-code hub_configs/{folder.name}`"
    for file in remote_code_files():
        shipped = folder / file.name
        assert shipped.is_file(), f"{file.name} is missing: {advice}"
        assert shipped.read_text() == file.read_text(), f"{file.name} is not current: {advice}"
    assert len(list(folder.glob("*.py"))) == len(remote_code_files())


def test_configuration_names_our_classes(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == AUTO_MAP
    assert config["custom_pipelines"] == CUSTOM_PIPELINES
    assert config["architectures"] == ["LibraForCausalLM"]


@pytest.mark.parametrize("name", ["libra-11b-base", "libra-11b-chat"])
def test_the_11b_configuration_is_the_default(name):
    loaded, default = LibraConfig.from_pretrained(HUB_CONFIGS / name), LibraConfig()
    for field in ("image_grid", "num_codebooks", "codebook_size", "feature_size", "expert_down_ratio", "bridge_rank"):
        assert getattr(loaded, field) == getattr(default, field)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for field in (*sizes, "rms_norm_eps", "max_position_embeddings", "rope_parameters"):
        assert getattr(loaded.text_config, field) == getattr(default.text_config, field)
    generation = GenerationConfig.from_pretrained(HUB_CONFIGS / name)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("name", ["libra-11b-base", "libra-11b-chat"])
def test_the_parts_of_11b_that_are_there_load(name):
    """All but weights and tokenizer, which are the authors' and Meta's."""
    folder = str(HUB_CONFIGS / name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.total_vocab_size == 32000 + 512**2 + 2
    images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert images.crop_size["height"] == images.size["shortest_edge"] == 336
    tokenizer = LibraImageTokenizerConfig.from_pretrained(folder, subfolder="image_tokenizer")
    for field in ("select_layers", "embed_dim", "num_codebooks", "codebook_size", "ch", "ch_mult", "resolution"):
        assert np.array_equal(getattr(tokenizer, field), getattr(LibraImageTokenizerConfig(), field)), field
    assert tokenizer.vision_config.num_hidden_layers == 24
    wanted = json.loads((Path(folder) / "processor_config.json").read_text(encoding="utf-8"))
    assert wanted["text_vocab_size"] == config.text_vocab_size
    assert ("caption_prompt" in wanted) == (name == "libra-11b-chat")
    assert (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


@pytest.mark.parametrize("name", ["libra-11b-base", "libra-11b-chat"])
def test_the_11b_folders_promise_no_weights(name):
    assert not list((HUB_CONFIGS / name).glob("*.safetensors"))
    assert "no weights" in (HUB_CONFIGS / name / "README.md").read_text(encoding="utf-8")


def test_minimal_card():
    card = ModelCard(model_card("some-name", license="llama2"))
    assert card.data.license == "llama2"
    assert "# some-name" in card.text
