"""A repository used as remote code, in a process where this package cannot be imported: from a local folder, from the
Hub's cache without a network, and saved again. Outputs are compared with the reference files of the authors' release.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from libra_cli.export import AUTO_MAP, remote_code_files
from modeling_libra import LibraConfig
from modeling_libra.conversion_libra import convert_ids
from tests.modeling.toys import assert_same

SCRIPT = Path(__file__).with_name("fresh_process.py")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLACES = ("local", "hub", "saved")


def run_fresh(repo: str, output: Path, golden: Path, hf_home: Path, save: Path | None = None) -> SimpleNamespace:
    images = [str(golden / "official_checkpoint" / f"image_{i}.png") for i in range(2)]
    command = [sys.executable, str(SCRIPT), repo, str(output), "--images", *images]
    environment = {**os.environ, "HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    result = subprocess.run(
        command + (["--save", str(save)] if save else []),
        cwd=hf_home,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    tensors = load_file(output / "tensors.safetensors")
    return SimpleNamespace(**report, tensors=tensors, repo=repo, stderr=result.stderr)


def fill_hub_cache(repo: Path, hf_home: Path) -> str:
    """Lays a repository out as a download from the Hub would; returns its id."""
    cached = hf_home / "hub" / "models--libra-team--libra-toy"
    shutil.copytree(repo, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    return "libra-team/libra-toy"


@pytest.fixture(scope="module")
def runs(repo, golden, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """What the fresh process reports for the repository in each of the places."""
    folder = tmp_path_factory.mktemp("remote")
    homes = {place: folder / place for place in PLACES}
    for home in homes.values():
        home.mkdir()
    hub_id = fill_hub_cache(repo, homes["hub"])
    saved = folder / "saved-again"
    return {
        "local": run_fresh(str(repo), homes["local"] / "out", golden, homes["local"]),
        "hub": run_fresh(hub_id, homes["hub"] / "out", golden, homes["hub"], save=saved),
        "saved": run_fresh(str(saved), homes["saved"] / "out", golden, homes["saved"]),
    }


@pytest.fixture(params=PLACES)
def run(request, runs) -> SimpleNamespace:
    return runs[request.param]


@pytest.fixture(scope="module")
def expected(golden) -> dict[str, torch.Tensor]:
    return load_file(golden / "official_checkpoint" / "expected.safetensors")


@pytest.fixture(scope="module")
def config(repo) -> LibraConfig:
    return LibraConfig.from_pretrained(repo)


def test_auto_classes_find_our_classes(run):
    assert run.classes == {
        "AutoConfig": "LibraConfig",
        "AutoModel": "LibraForCausalLM",
        "AutoModelForCausalLM": "LibraForCausalLM",
        "AutoModelForImageTextToText": "LibraForCausalLM",
        "AutoModelForMultimodalLM": "LibraForCausalLM",
        "AutoProcessor": "LibraProcessor",
        "AutoImageProcessor": "LibraImageProcessor",
        "AutoTokenizer": "LlamaTokenizer",
    }
    assert run.image_tokenizer == "LibraImageTokenizer"


def test_code_is_the_repository_s(run):
    ours = {name: module for name, module in run.modules.items() if name != "AutoTokenizer"}
    assert all(module.startswith("transformers_modules.") for module in ours.values())


def test_auto_map_stays_relative(run):
    assert run.auto_map == AUTO_MAP


def test_pixels_features_and_codes(run, expected):
    assert_same(run.tensors["pixel_values"], expected["pixel_values"])
    assert_same(run.tensors["clip_features"], expected["clip_features"])
    assert_same(run.tensors["image_features"], expected["clip_features"])
    assert torch.equal(run.tensors["codes"], expected["codes"].flatten(1, 2))
    assert_same(run.tensors["reconstruction"], expected["reconstruction"], 1e-3)


def test_prompt_ids(run, expected, config):
    kept = expected["attention_mask"].bool()
    assert torch.equal(run.tensors["attention_mask"], expected["attention_mask"])
    assert torch.equal(run.tensors["input_ids"][kept], convert_ids(expected["input_ids"], config)[kept])


def test_logits(run, expected, config):
    kept = expected["attention_mask"].bool()
    is_vision = run.tensors["input_ids"] >= config.text_vocab_size
    text_rows, vision_rows = kept & ~is_vision, kept & is_vision
    vocab_size = config.text_vocab_size
    assert_same(run.tensors["logits"][text_rows], expected["logits"][0][text_rows][:, :vocab_size])
    codebooks = expected["logits"][:, vision_rows][..., vocab_size:]  # (codebooks, vision rows, size + 2)
    assert_same(run.tensors["vision_logits"], codebooks.transpose(0, 1))


def test_greedy_answers(run, expected, config):
    generated = convert_ids(expected["generated"], config)
    length = expected["input_ids"].shape[-1]
    assert torch.equal(run.tensors["generated"][:, length:], generated[:, length:])


def test_text_to_image(run, expected, config):
    assert torch.equal(run.tensors["t2i_input_ids"], convert_ids(expected["t2i_input_ids"], config))
    assert torch.equal(run.tensors["t2i_generated"], convert_ids(expected["t2i_generated"], config))
    assert run.tensors["t2i_size"].tolist() == [32, 32]


def test_image_to_text_pipeline(run, golden):
    results = run.pipelines
    assert results["class"] == "LibraImageToTextPipeline"
    assert results["path"] == results["image"] == results["list"][0]
    assert results["list"] == results["batch"]
    assert results["list"][0] != results["list"][1]
    (answer,) = results["question"]
    official = json.loads((golden / "official_checkpoint" / "expected.json").read_text(encoding="utf-8"))
    assert official["answers"][0].startswith(answer["generated_text"])


def test_image_text_to_text_pipeline(run, golden):
    official = json.loads((golden / "official_checkpoint" / "expected.json").read_text(encoding="utf-8"))
    answers = [result[0]["generated_text"].rstrip("\ufffd") for result in run.pipelines["chats"]]
    assert all(expected.startswith(answer) for expected, answer in zip(official["answers"], answers))
    assert run.pipelines["chat"] == run.pipelines["chats"][0]


@pytest.mark.parametrize("place", ["local", "saved"])
def test_repository_carries_all_code(runs, place):
    carried = {file.name for file in Path(runs[place].repo).glob("*.py")}
    assert carried == {file.name for file in remote_code_files()}


def test_nothing_alarming_is_printed(run):
    # Not progress bars, and not what torch says of torchao, which transformers imports where it is installed.
    lines = [line for line in run.stderr.splitlines() if "|" not in line and "torch/utils/_pytree.py" not in line]
    assert not [line for line in lines if "rror" in line or "not supported" in line or "newly initialized" in line]


def test_remote_code_is_flat_and_self_contained():
    files = remote_code_files()
    assert len({file.name for file in files}) == len(files)
    assert not [file.name for file in files if "conversion" in file.name]
    for file in files:
        source = file.read_text(encoding="utf-8")
        assert "from .." not in source, file
        assert not any(f"import {package}" in source for package in ("processing", "libra_cli", "training")), file
