"""`libra quantize`: what has fewer bits, what has not, and that it answers in a process without this package."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from libra_cli.loading import load_libra
from libra_cli.main import main
from libra_cli.push import plan_push
from libra_cli.quantization import NOT_QUANTIZED, quantization_config
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "hub_configs" / "libra-tiny"
AIRPLANE = REPOSITORY / "samples" / "airplane.png"


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """libra-tiny in 8 bits."""
    folder = tmp_path_factory.mktemp("quantized") / "libra-tiny-int8"
    assert main(["quantize", str(TINY), str(folder)]) == 0
    return folder


def test_what_has_8_bits(int8):
    model, _ = load_libra(int8)
    linear = {name: m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {name for name, weight in linear.items() if "Int8" in type(weight.data).__name__}
    kept = {name for name in linear if any(re.match(rf"(?:{part})(\.|$)", name) for part in NOT_QUANTIZED)}
    assert quantized == linear.keys() - kept
    layers = model.config.text_config.num_hidden_layers
    assert len(quantized) == layers * (7 + 14)  # the language model's maps, and both halves of the expert's
    assert {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in kept if "bridge" in name} == {
        f"{kind}_bridge_on_{side}" for kind in "kv" for side in ("vision", "language")
    }


def test_the_file_is_smaller_and_says_what_it_is(int8):
    stored = load_file(int8 / "model.safetensors")
    assert sum(weight.dtype == torch.int8 for name, weight in stored.items() if name.endswith("qdata")) == 6 * 21
    assert (int8 / "model.safetensors").stat().st_size < (TINY / "model.safetensors").stat().st_size  # that is float16
    config = json.loads((int8 / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    coder = load_file(int8 / "image_tokenizer" / "model.safetensors")
    assert {weight.dtype for weight in coder.values()} == {torch.float16}  # as the source has it
    assert load_libra(int8)[1].image_tokenizer.dtype == torch.float32


def test_the_card_is_its_own(int8):
    card = ModelCard((int8 / "README.md").read_text())
    assert (card.data.base_model, card.data.base_model_relation) == ("libra-tiny", "quantized")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en", "zh"])
    assert "# libra-tiny-int8\n" in card.text
    assert "in int8" in card.text
    for wrong in ("float16", "20 MB", "![", str(TINY)):
        assert wrong not in card.text


def test_it_can_be_pushed(int8):
    assert plan_push("team/libra-tiny-int8", int8).problems == []


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_what_is_quantized_already(int8, verb, tmp_path, capsys, monkeypatch):
    for loads in ("quantization", "export"):  # before any work
        monkeypatch.setattr(f"libra_cli.{loads}.load_libra", None)
    assert main([verb, str(int8), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is quantized already" in line
    assert not (tmp_path / "out").exists()


def test_a_caption_elsewhere(int8, tmp_path):
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "hub" / "fresh_caption.py", int8, AIRPLANE],
        cwd=tmp_path, env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert bytes.fromhex(result.stdout.split()[-1]).decode().strip() == "airplane"


def test_logits_stay_close(int8):
    inputs = None
    logits = []
    for folder in (TINY, int8):
        model, processor = load_libra(folder)
        inputs = inputs or processor(text="<image>\nhorse", images=str(AIRPLANE), return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**inputs).logits[:, -1].log_softmax(-1))
    difference = (logits[0] - logits[1]).abs()
    assert 0 < difference.max() < 0.5


def test_mistakes(int8, capsys, monkeypatch):
    assert main(["quantize", str(TINY), str(int8)]) == 2
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no form 'int3'"):
        quantization_config("int3")
    monkeypatch.setattr("libra_cli.quantization.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libra-vlm\[quantize\]"):
        quantization_config("int8")
