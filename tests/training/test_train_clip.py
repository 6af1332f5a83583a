"""The CLIP stage: the objective, the probe, a short run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from tests.training.libra_parts import SMALL_TOKENIZER
from training.clip_evaluation import probe_accuracy
from training.clip_objective import ClipCollator, contrast, patch_regions, pool_regions, train_text_tokenizer
from training.images import CaptionedFolder, to_pixel_values
from training.train_clip import WorldSamples, main
from training.world.concepts import training_subjects
from training.world.scenes import World

TINY = """
vision_config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, image_size: 48, patch_size: 12}
text_config: {vocab_size: 200, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 16}
projection_dim: 16
select_layers: [1, 2]
concept_fraction: 1.0
teacher_size: 32
max_steps: 2
per_device_train_batch_size: 4
train_sampling_strategy: sequential
remove_unused_columns: false
logging_steps: 1
save_steps: 1
save_total_limit: 1
report_to: none
use_cpu: true
disable_tqdm: true
"""


def test_pixels_are_those_of_clip():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    reference = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(to_pixel_values(image, 48), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(20, 60), (150, 233), (200, 101)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pixels_are_those_of_the_processor(size, mode):
    """Of any shape, and with transparency: what the image tokenizer learns from is what it is shown later."""
    channels = len(mode)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    image = Image.fromarray(pixels, mode)
    processor = LibraImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(to_pixel_values(image, 48), expected, atol=1e-5, rtol=0)


def test_regions_are_the_image_and_its_quarters():
    patches = torch.arange(16.0).view(1, 16, 1)  # 4 x 4, row by row
    regions = pool_regions(patches)[0, :, 0]
    assert regions.tolist() == [7.5, 2.5, 4.5, 10.5, 12.5]


def test_patches_are_part_of_their_quarter_or_of_the_image():
    single, grid, unnamed = patch_regions(torch.tensor([[7, -1, -1, -1, -1], [-1, 0, 1, 2, 3], [-1] * 5]), 4).tolist()
    assert single == [7] * 16
    assert grid == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    assert unnamed == [-1] * 16


def test_contrast_counts_images_with_one_text_together():
    logits = torch.tensor([[5.0, -5.0, 0.0], [5.0, -5.0, 0.0], [-5.0, 5.0, 0.0]])
    good = contrast(logits, torch.tensor([0, 0, 1]))
    bad = contrast(logits, torch.tensor([1, 1, 0]))
    assert good < 0.4 < bad
    perfect = contrast(100 * torch.eye(3), torch.arange(3))
    assert perfect == pytest.approx(0.0, abs=1e-6)


def test_batches_name_every_region(icons):
    samples = WorldSamples(World(training_subjects(icons), "train", 40, max_objects=4), 48)
    tokenizer = train_text_tokenizer([s.label for s in samples.world.subjects] + ["nothing"], 200, 16)
    features = torch.arange(16.0)[:, None]
    batch = ClipCollator(tokenizer, ["horse", "nothing"], features)([samples[i] for i in range(40)])
    names = batch["regions"].view(40, 5)
    for index in range(40):
        scene = samples.world[index]
        for item in scene.objects:
            region = 0 if item.cell is None else item.cell + 1
            text = tokenizer.decode(batch["input_ids"][names[index, region]], skip_special_tokens=True)
            assert text.replace(" ", "") == samples.world.subjects[item.subject].label.replace(" ", "").lower()
        assert (names[index, 0] >= 0) == scene.is_single
        assert (names[index, 1:] == 1).sum() == (0 if scene.is_single else 4 - len(scene.objects))
    drawn = [2 * item.subject + item.drawing for index in range(40) for item in samples.world[index].objects]
    assert batch["teacher"][:, 0].tolist() == drawn
    assert len(batch["taught"]) == len(drawn)


def test_probe_finds_what_is_linear():
    torch.manual_seed(0)
    targets = torch.arange(200) % 4
    features = torch.eye(4)[targets] @ torch.randn(4, 16) + 0.1 * torch.randn(200, 16)
    train, test = (features[:100], targets[:100]), (features[100:], targets[100:])
    wrong = (features[100:], (targets[100:] + 1) % 4)
    assert probe_accuracy(train, [test, wrong], 4) == [1.0, 0.0]


def test_two_steps_on_the_world_and_going_on(icons, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(TINY)
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--output_dir", str(out), "--icons", str(icons)]
    metrics = main(arguments)
    assert set(metrics) == {
        *(f"{kind}_{vendors}" for kind in ("probe", "zero_shot") for vendors in ("train_vendors", "unseen_vendor")),
        "chance",
    }
    assert metrics["chance"] == 1 / 8
    model = CLIPModel.from_pretrained(out)
    vision = CLIPVisionModel.from_pretrained(out / "vision")
    pixels = torch.randn(1, 3, 48, 48)
    expected = model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(vision(pixel_values=pixels).last_hidden_state, expected)
    assert CLIPImageProcessor.from_pretrained(out / "vision").crop_size["height"] == 48
    main([*arguments, "--max_steps", "3"])
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert {"loss_caption", "loss_region", "loss_teacher"} <= state["log_history"][0].keys()


def test_a_folder_of_captioned_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for index in range(8):
        Image.new("RGB", (40 + index, 50), (30 * index, 0, 0)).save(folder / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"red number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    config = tmp_path / "config.yaml"
    config.write_text(TINY)
    out = tmp_path / "out"
    assert main(["--config", str(config), "--output_dir", str(out), "--dataset", str(folder)]) == {}
    assert (out / "vision" / "model.safetensors").is_file()


def test_a_folder_without_captions_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="have no captions"):
        CaptionedFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        CaptionedFolder(tmp_path / "missing")


def test_a_vision_tower_trained_further(icons, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(TINY)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=48,
            patch_size=12,
        )
    )
    LibraImageTokenizer.from_clip(tower, **SMALL_TOKENIZER).save_pretrained(tmp_path / "tokenizer")
    main(
        ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--icons", str(icons), "--max_steps", "1",
         "--learning_rate", "0", "--start_from", str(tmp_path / "tokenizer")]
    )  # fmt: skip
    expected, actual = tower.state_dict(), CLIPVisionModel.from_pretrained(tmp_path / "out" / "vision").state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
