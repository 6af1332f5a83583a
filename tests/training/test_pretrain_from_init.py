"""Pretraining of what `libra init` wrote, on a folder of captioned images."""

import json
import shutil

import pytest
import torch
from PIL import Image

from libra_cli.init import init_repo
from libra_cli.loading import load_libra
from tests.conftest import REPOSITORY
from tests.parts import TOKENIZER_FIELDS, make_clip, make_llm
from training import pretrain
from training.pretrain import PretrainArguments, PretrainCollator

CAPTIONS = {"horse": "a horse.", "key": "a key.", "strawberry": "a ripe strawberry."}
OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


@pytest.fixture
def samples(tmp_path):
    """A folder of the three samples, with captions."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for name in CAPTIONS:
        shutil.copy(REPOSITORY / "samples" / f"{name}.png", folder)
    rows = [{"file_name": f"{name}.png", "text": caption} for name, caption in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def measure_loss(folder, samples) -> float:
    model, processor = load_libra(folder)
    images = [{"image": Image.open(samples / f"{name}.png"), "text": caption} for name, caption in CAPTIONS.items()]
    batch = processor.tokenize_images(PretrainCollator(processor)(images))
    batch.pop("draws")
    with torch.no_grad():
        return model(**batch).loss.item()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_three_steps_lower_the_loss(family, golden, samples, tmp_path):
    llm = make_llm(tmp_path / "llm", family, golden)
    start = init_repo(llm, make_clip(tmp_path / "clip"), tmp_path / "start", **TOKENIZER_FIELDS)
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    pretrain.main(
        ["--model", str(start), "--dataset", str(samples), "--output_dir", str(tmp_path / "out"), *flags]
    )  # fmt: skip
    assert measure_loss(tmp_path / "out", samples) < measure_loss(start, samples) - 0.05
    weights = load_libra(tmp_path / "out")[0].state_dict()
    for name, weight in load_libra(start)[0].state_dict().items():
        assert "vision" in name or torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(
    "places",
    [{}, {"language_model": "a"}, {"image_tokenizer": "a"}, {"model": "a", "image_tokenizer": "b"}],
)
def test_where_to_start_from_is_one_or_the_other(places):
    with pytest.raises(ValueError, match="Pass either model, or language_model and image_tokenizer"):
        PretrainArguments(**places)
