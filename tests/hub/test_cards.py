"""The model cards: complete, with metadata as the Hub wants it, numbers that are counted, and code that runs."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from modeling_libra import LibraConfig, LibraForCausalLM
from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from training.inference_memory import weight_bytes

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("libra-tiny", "libra-11b-base", "libra-11b-chat")
TINY = ROOT / "hub_configs" / "libra-tiny"

SECTIONS = {
    "libra-tiny": ["Intended use", "Results", "Use", "Memory", "What it learned from", "Limits", "Risks", "Citation"],
    "libra-11b-base": [
        "Use",
        "Intended use",
        "What it learned from",
        "Evaluation",
        "What was checked",
        "Memory",
        "Limits and risks",
        "Licence",
        "Citation",
    ],
}
SECTIONS["libra-11b-chat"] = SECTIONS["libra-11b-base"]

FIELDS = {
    "license": r"apache-2\.0|llama2",
    "license_link": r"https://\S+",
    "library_name": r"transformers",
    "pipeline_tag": r"image-text-to-text",
    "base_model": r"[\w.-]+/[\w.-]+",
    "language": r"[a-z]{2}",
    "datasets": r"[\w.-]+/[\w.-]+",
    "tags": r"[a-z0-9-]+",
    "model-index": None,
}
"""The fields of a card and what an entry looks like: the part of the Hub's schema that our cards use."""

CARDS = [pytest.param(ROOT / "hub_configs" / name / "README.md", id=name) for name in NAMES]


@pytest.fixture(params=CARDS)
def card(request) -> Path:
    return request.param


def test_metadata_is_what_the_hub_knows(card):
    metadata = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
    assert metadata.keys() <= FIELDS.keys()
    assert {"license", "library_name", "pipeline_tag", "language", "tags"} <= metadata.keys()
    for name, value in metadata.items():
        if FIELDS[name] is not None:
            for entry in value if isinstance(value, list) else [value]:
                assert re.fullmatch(FIELDS[name], entry), (name, entry)


def test_results_are_complete(card):
    for result in ModelCard.load(card).data.eval_results or []:
        assert result.task_type
        assert result.dataset_type
        assert result.metric_type in ("accuracy", "f1", "psnr")
        assert isinstance(result.metric_value, float)


def test_sections(card):
    text = card.read_text(encoding="utf-8")
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [name for name in SECTIONS[card.parent.name] if name not in found] == []
    assert "@inproceedings{xu2024libra," in text


def test_pictures_are_there(card):
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.read_text(encoding="utf-8")):
        assert (card.parent / picture).is_file()


def test_the_tiny_card_is_that_of_its_template():
    """Everything but the numbers; `training/card.py` fills them in."""
    template = (ROOT / "training" / "configs" / "tiny" / "card.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    text = (TINY / "README.md").read_text(encoding="utf-8")
    for part in re.split(r"\$\{?\w+\}?", template):
        assert part.strip() in text


@pytest.mark.parametrize("card", CARDS)
def test_snippets_run(card, tmp_path, monkeypatch):
    """With libra-tiny in place of the weights that are not here."""
    name = card.parent.name
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    Image.open(ROOT / "samples" / "airplane.png").convert("RGB").save(tmp_path / "photo.jpg")
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "hub_configs").symlink_to(ROOT / "hub_configs")
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    for block in blocks:
        exec(block.replace(f'"{name}"', repr(str(TINY))), {"print": lambda *things: printed.extend(map(str, things))})
    assert printed
    # libra-tiny is tuned on conversations: in the layout of pretraining it may have nothing to say
    assert all(printed) or name == "libra-11b-base"
    assert (tmp_path / "drawn.png").is_file() == (name == "libra-11b-base")


@pytest.mark.parametrize("name", NAMES[1:])
def test_memory_is_counted(name):
    with torch.device("meta"):
        config = LibraConfig()
        model, tokenizer = LibraForCausalLM(config), LibraImageTokenizer(LibraImageTokenizerConfig())
    weights, images = (sum(weight.numel() for weight in part.parameters()) for part in (model, tokenizer))
    text = config.text_config
    a_token = text.num_hidden_layers * 2 * (text.num_key_value_heads * text.head_dim + config.bridge_rank)
    card = (ROOT / "hub_configs" / name / "README.md").read_text(encoding="utf-8")
    assert f"{weights / 1e9:.2f} billion parameters" in card
    for dtype, size in (("float32", 4), ("bfloat16, float16", 2)):
        lengths = (660, text.max_position_embeddings)
        totals = [size * weights + 4 * images + size * length * a_token for length in lengths]
        cells = [f"{count / 1e9:.1f} GB" for count in (size * weights, 4 * images, *totals)]
        assert f"| {dtype} | {' | '.join(cells)} |" in card
    for form, label in (("int8", "int8 (`libra quantize`)"), ("nf4", "nf4 (`libra quantize --to nf4`)")):
        stored = weight_bytes(config, form)
        totals = [stored + 4 * images + 2 * length * a_token for length in (660, text.max_position_embeddings)]
        cells = [f"{count / 1e9:.1f} GB" for count in (stored, 4 * images, *totals)]
        assert f"| {label} | {' | '.join(cells)} |" in card
