"""The image tokenizer stage: short runs, with and without the discriminator; what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from trl import TrlParser

from processing.configuration_libra_image_tokenizer import LibraImageTokenizerConfig
from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from tests.training.libra_parts import SMALL_TOKENIZER
from training.train_image_tokenizer import ImageTokenizerArguments, main

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "tokenizer_config": SMALL_TOKENIZER,
    "other_emoji": False,
    "train_samples": 100,
    "eval_samples": 8,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}

GAN = {"gan_weight": 0.5, "gan_start": 1, "discriminator_channels": 8, "discriminator_learning_rate": 1e-3}


@pytest.fixture
def clip_folder(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=12
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def image_folder(tmp_path):
    """Images without captions, some of them held out."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 3)):
        (tmp_path / "images" / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((64, 48), Image.Resampling.BILINEAR)
            picture.save(tmp_path / "images" / split / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def write_config(tmp_path, clip_folder):
    """Writes a configuration and gives the arguments of the command line for it."""

    def write(out: str, **settings) -> list[str]:
        config = tmp_path / f"{out}.yaml"
        config.write_text(yaml.safe_dump({**TINY, "clip": str(clip_folder), **settings}))
        return ["--config", str(config), "--output_dir", str(tmp_path / out)]

    return write


def logged(checkpoint: Path) -> list[dict[str, float]]:
    """The log of training, a step each."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_two_steps_on_the_world_and_going_on(icons, clip_folder, write_config, tmp_path):
    arguments = [*write_config("out", save_total_limit=1), "--icons", str(icons)]
    out = tmp_path / "out"
    metrics = main(arguments)
    assert {"eval_loss", "eval_psnr", "eval_ssim", "eval_usage_0", "eval_perplexity_1"} <= metrics.keys()
    assert json.loads((out / "metrics.json").read_text()) == metrics
    tokenizer = LibraImageTokenizer.from_pretrained(out)
    frozen = CLIPVisionModel.from_pretrained(clip_folder).state_dict()
    kept = tokenizer.clip.state_dict()
    assert all(torch.equal(kept[key], frozen[key]) for key in kept)
    assert LibraImageProcessor.from_pretrained(out).crop_size["height"] == 48
    main([*arguments, "--max_steps", "3"])
    log = logged(out / "checkpoint-3")
    assert len(log) == 3
    reconstruction = {"l1", "mse", "perceptual", "psnr", "ssim"}
    quantizer = {"per_sample_entropy", "codebook_entropy", "commitment", "usage_0", "perplexity_0", "perplexity_1"}
    assert reconstruction | quantizer <= log[0].keys()
    assert not {"generator", "discriminator_loss"} & log[-1].keys()
    assert not (out / "checkpoint-3" / "discriminator.pt").exists()


def test_the_loss_is_the_sum_of_its_terms_and_the_discriminator_begins_at_its_step(
    image_folder, write_config, tmp_path
):
    """And a picture is drawn every second step and at the end, of the held out images."""
    settings = {"max_steps": 3, "save_steps": 3, "mse_weight": 0.0, "perceptual_weight": 0.3, "grid_steps": 2}
    metrics = main(write_config("out", dataset=str(image_folder), **settings, **GAN))
    out = tmp_path / "out"
    log = logged(out / "checkpoint-3")
    adversarial = {"generator", "adaptive_weight", "discriminator_loss", "logits_real", "logits_fake"}
    assert [adversarial & entry.keys() for entry in log] == [set(), adversarial, adversarial]
    for entry in log:
        quantizer = 0.1 * (entry["per_sample_entropy"] - 2.5 * entry["codebook_entropy"]) + entry["commitment"]
        adversary = 0.5 * entry.get("adaptive_weight", 0) * entry.get("generator", 0)
        total = entry["l1"] + 0.3 * entry["perceptual"] + quantizer + adversary
        assert entry["loss"] == pytest.approx(total, abs=2e-3)
    assert sorted(path.name for path in (out / "reconstructions").iterdir()) == ["step-000002.png", "step-000003.png"]
    assert Image.open(out / "reconstructions" / "step-000002.png").size == (3 * 48, 2 * 48)
    assert metrics["eval_psnr"] > 0
    assert "eval_generator" not in metrics


def test_a_resumed_run_is_an_uninterrupted_one(image_folder, write_config, tmp_path):
    """Losses, weights and the state of both optimizers and schedules, bit for bit. The discriminator has learned before
    the interruption."""
    settings = {"dataset": str(image_folder), "max_steps": 4, "save_steps": 2, "lr_scheduler_type": "cosine", **GAN}
    main(write_config("whole", **settings))
    whole, resumed = (tmp_path / name / "checkpoint-4" for name in ("whole", "resumed"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    main(write_config("resumed", **settings))
    timeless = [[{k: v for k, v in e.items() if "per_second" not in k} for e in logged(x)] for x in (whole, resumed)]
    assert timeless[0] == timeless[1]
    first, second = (load_file(path / "model.safetensors") for path in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("discriminator.pt", "optimizer.pt", "scheduler.pt"):
        torch.testing.assert_close(*(torch.load(path / name) for path in (resumed, whole)), rtol=0, atol=0)
    before = torch.load(tmp_path / "whole" / "checkpoint-2" / "discriminator.pt")["discriminator"]
    after = torch.load(whole / "discriminator.pt")["discriminator"]
    assert all(not torch.equal(before[name], after[name]) for name in after)


def test_a_run_without_discriminator_does_not_go_on_with_one(image_folder, write_config):
    main(write_config("out", dataset=str(image_folder), max_steps=1))
    with pytest.raises(FileNotFoundError, match=r"no discriminator\.pt.*another output_dir"):
        main(write_config("out", dataset=str(image_folder), **GAN))


def test_two_processes_are_one(image_folder, write_config, tmp_path):
    """Half a batch each gives the losses and weights of the whole batch. The entropy of the codes is that of a batch, so
    it stays out of the loss here."""
    settings = {"max_steps": 3, "save_steps": 3, "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, **GAN}
    settings |= {"dataset": str(image_folder), "gan_start": 0, "per_device_eval_batch_size": 1}
    settings["tokenizer_config"] = {**TINY["tokenizer_config"], "entropy_loss_weight": 0.0}
    main(write_config("one", **settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = write_config("two", **{**settings, "per_device_train_batch_size": 2})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "-m", "training.train_image_tokenizer", *arguments],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=300,
    )
    one, two = (tmp_path / name / "checkpoint-3" for name in ("one", "two"))
    for alone, together in zip(logged(one), logged(two), strict=True):
        for name in ("loss", "adaptive_weight", "usage_0", "perplexity_1"):
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4), name
    torch.testing.assert_close(load_file(two / "model.safetensors"), load_file(one / "model.safetensors"))
    # Adam makes whole steps out of gradients that are nothing but rounding
    adversaries = [torch.load(path / "discriminator.pt")["discriminator"] for path in (two, one)]
    torch.testing.assert_close(*adversaries, rtol=1e-3, atol=1e-4)


class SquaredDifference(nn.Module):
    """In the place of LPIPS, whose weights cannot be had offline."""

    def __init__(self, net, verbose):
        super().__init__()

    def forward(self, in0, in1):
        assert in1.min() >= -1 - 1e-5
        assert in1.max() <= 1 + 1e-5
        return (in0 - in1).square().mean(dim=(1, 2, 3), keepdim=True)


def test_the_lpips_term(image_folder, write_config, tmp_path, monkeypatch):
    module = ModuleType("lpips")
    module.LPIPS = SquaredDifference
    monkeypatch.setitem(sys.modules, "lpips", module)
    main(write_config("out", dataset=str(image_folder / "train"), max_steps=1, perceptual="lpips"))
    entry = logged(tmp_path / "out" / "checkpoint-1")[0]
    assert entry["perceptual"] == entry["mse"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perceptual": "vgg"}, "perceptual must be one of lpips, encoder, none, found 'vgg'"),
        ({"gan_weight": -1.0}, "gan_weight must not be negative, found -1"),
        ({"gan_start": -1}, "gan_start must not be negative"),
        ({"fit_bits_steps": -1}, "fit_bits_steps must not be negative"),
        ({"fit_bits_steps": 1, "codes_of": "there"}, "fit_bits_steps makes new codes"),
        ({"grid_images": 0}, "grid_images must be at least 1"),
        ({"l1_weight": 0.0, "mse_weight": 0.0, "perceptual": "none"}, "no reconstruction term"),
        ({"dataset": "nowhere"}, "nowhere is not a folder"),
        ({"perceptual_layer": 3}, "perceptual_layer is 3, but CLIP runs no deeper than select_layers, to 2"),
        ({"tokenizer_config": {**TINY["tokenizer_config"], "resolution": 24}}, "draws 24 pixels a side.*have 48"),
        ({**GAN, "discriminator_layers": 5}, "48 pixels are too small for a discriminator of 5 layers, which needs 96"),
        ({**GAN, "discriminator_channels": 12}, "multiple of 8"),
        ({**GAN, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "follows the loss"),
    ],
)
def test_what_is_refused(settings, message, image_folder, write_config, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(write_config("out", **{"dataset": str(image_folder), **settings}))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_full_size_configuration(tmp_path, monkeypatch):
    """Its architecture is the release's, its adversarial weights those of the authors' code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGES").mkdir()
    config = ROOT / "training" / "configs" / "image_tokenizer_11b.yaml"
    parser = TrlParser((ImageTokenizerArguments,))
    script, _ = parser.parse_args_and_config(["--config", str(config)], return_remaining_strings=True)
    found = LibraImageTokenizerConfig(**script.tokenizer_config)
    assert found.to_dict() == LibraImageTokenizerConfig().to_dict()
    script.check(found)
    assert (script.perceptual, script.l1_weight, script.mse_weight, script.perceptual_weight) == ("lpips", 1, 0, 1)
    assert (script.gan_weight, script.discriminator_channels, script.discriminator_layers) == (0.8, 64, 3)


def test_quantizer_and_decoder_trained_further_and_codes_kept(image_folder, write_config, tmp_path):
    """With a learning rate of 0, what a run starts from is what it writes."""
    common = {"dataset": str(image_folder), "max_steps": 1, "save_steps": 1}
    main(write_config("first", **common))
    main(write_config("further", **common, learning_rate=0.0, seed=1, start_from=str(tmp_path / "first")))
    main(write_config("kept", **common, learning_rate=0.1, seed=1, codes_of=str(tmp_path / "first")))
    first, further, kept = (
        LibraImageTokenizer.from_pretrained(tmp_path / name).state_dict() for name in ("first", "further", "kept")
    )
    assert all(torch.equal(further[name], first[name]) for name in first)
    same = {name for name in first if torch.equal(kept[name], first[name])}
    before_decoder = {name for name in first if name.startswith(("clip.", "pre_quant.", "quantizer.pre"))}
    assert before_decoder <= same
    assert not any(name.startswith("decoder.conv") for name in same)


def test_fitted_bits_stay_and_a_run_that_goes_on_does_not_fit_again(image_folder, write_config, tmp_path, capsys):
    common = {"dataset": str(image_folder), "fit_bits_steps": 100, "lr_scheduler_type": "constant"}
    main(write_config("out", **common, max_steps=1))
    assert "fitting bits: step 100/100" in capsys.readouterr().out
    main([*write_config("out", **common), "--max_steps", "2"])
    assert "fitting bits" not in capsys.readouterr().out
    first, second = (load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    frozen = {name for name in first if name.startswith(("clip.", "pre_quant.", "quantizer.project_in."))}
    assert {name for name in first if torch.equal(first[name], second[name])} == frozen
