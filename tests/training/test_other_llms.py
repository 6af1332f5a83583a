"""Another language model, from beginning to end: `libra init`, pretraining, `libra export`, and a caption elsewhere."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel

from libra_cli.caption import caption_images
from libra_cli.loading import load_libra
from libra_cli.main import main
from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from tests.conftest import REPOSITORY
from tests.parts import TOKENIZER_FIELDS, make_clip, make_llm

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
OPTIONS = {
    "max_steps": 5,
    "per_device_train_batch_size": 3,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_init_pretrain_export_reload_caption(family, golden, tmp_path, capsys):
    llm = make_llm(tmp_path / "llm", family, golden)
    data, image = make_data(tmp_path / "data"), str(tmp_path / "data" / "red.png")
    parts = [str(tmp_path / name) for name in ("llm", "image_tokenizer", "start", "trained", "repo")]
    make_image_tokenizer(tmp_path)
    assert main(["init", *parts[:3]]) == 0
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    assert main(["train", "pretrain", "--model", parts[2], "--dataset", data, "--output_dir", parts[3], *flags]) == 0
    assert main(["export", parts[3], parts[4]]) == 0
    capsys.readouterr()

    history = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    model, _ = load_libra(parts[4])
    assert model.config.text_config.model_type == family
    start, _ = load_libra(parts[2])
    moved = [name for name, weight in model.state_dict().items() if not torch.equal(weight, start.state_dict()[name])]
    assert moved
    assert all("vision" in name for name in moved)  # the language model is still the one of `llm`

    expected = caption_images([image], parts[4], max_new_tokens=8)
    assert caption_elsewhere(parts[4], image, tmp_path) == expected[0]
    assert llm.is_dir()


def make_data(folder) -> str:
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    rows = [{"file_name": f"{name}.png", "text": f"a {name} square."} for name in COLOURS]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def make_image_tokenizer(folder) -> None:
    """A small one around a random CLIP, with its image processor, as training leaves it."""
    clip = CLIPVisionModel.from_pretrained(make_clip(folder / "clip"))
    tokenizer = LibraImageTokenizer.from_clip(clip, select_layers=[1, 2], **TOKENIZER_FIELDS)
    tokenizer.save_pretrained(folder / "image_tokenizer")
    processor = LibraImageProcessor.from_pretrained(folder / "clip")
    processor.save_pretrained(folder / "image_tokenizer")


def caption_elsewhere(repo: str, image: str, folder) -> str:
    """What the pipeline says in a process without this package."""
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "hub" / "fresh_caption.py", repo, image],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return bytes.fromhex(result.stdout.split()[-1] if result.stdout.split() else "").decode()
