"""The image tokenizer stage: its measures, a short run."""

import json

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from training.train_image_tokenizer import clip_to_unit, codebook_use, main, psnr, unit_to_clip

TINY = """
tokenizer_config:
  select_layers: [1, 2]
  embed_dim: 16
  codebook_size: 16
  z_channels: 32
  ch: 32
  ch_mult: [1, 1]
  num_res_blocks: 0
  attn_resolutions: []
  num_attn_heads: 1
  resolution: 48
other_emoji: false
train_samples: 100
eval_samples: 8
max_steps: 2
per_device_train_batch_size: 4
logging_steps: 1
save_steps: 1
save_total_limit: 1
report_to: none
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture
def clip_folder(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=12
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_pixel_scales_are_inverse():
    pixels = torch.rand(2, 3, 4, 4) * 2 - 1
    torch.testing.assert_close(clip_to_unit(unit_to_clip(pixels)), pixels)
    white = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(unit_to_clip(torch.ones(1, 3, 1, 1)).flatten(), white)


def test_psnr():
    target = torch.zeros(2, 3, 4, 4)
    found = psnr(torch.stack([target[0] + 0.2, target[1] + 5.0]), target)
    assert found.tolist() == pytest.approx([20.0, 6.0206], abs=1e-3)  # 4 / 0.04; clamped to 1: 4 / 1


def test_codebook_use():
    codes = torch.stack([torch.arange(64) % 4, torch.zeros(64, dtype=torch.long)], dim=-1)
    use = codebook_use(codes, 8)
    assert use == {"usage_0": 0.5, "perplexity_0": 4.0, "usage_1": 0.125, "perplexity_1": 1.0}


def test_two_steps_on_the_world_and_going_on(icons, clip_folder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(TINY)
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--clip", str(clip_folder), "--output_dir", str(out), "--icons", str(icons)]
    metrics = main(arguments)
    assert {"eval_loss", "eval_psnr", "eval_usage_0", "eval_perplexity_1"} <= metrics.keys()
    tokenizer = LibraImageTokenizer.from_pretrained(out)
    frozen = CLIPVisionModel.from_pretrained(clip_folder).state_dict()
    kept = tokenizer.clip.state_dict()
    assert all(torch.equal(kept[key], frozen[key]) for key in kept)
    assert LibraImageProcessor.from_pretrained(out).crop_size["height"] == 48
    main([*arguments, "--max_steps", "3"])
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    terms = {"l1", "mse", "perceptual", "per_sample_entropy", "codebook_entropy", "commitment", "psnr"}
    assert terms <= state["log_history"][0].keys()
