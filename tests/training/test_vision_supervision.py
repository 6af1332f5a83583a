"""Rows (a) and (b) of Table 3: what is predicted of images in pretraining, and where a fresh vision system is chosen."""

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

from libra_cli.init import init_libra
from libra_cli.loading import load_libra
from modeling_libra import LibraForCausalLM
from tests.training.libra_parts import make_parts
from training import pretrain
from training.data import DataArguments, load_caption_data
from training.feature_regression import FeatureHead
from training.pretrain import LibraPretrainer, PretrainArguments, PretrainCollator

SETTINGS = """
dataset: world
train_samples: 40
eval_samples: 4
per_device_train_batch_size: 4
learning_rate: 1.0e-2
lr_scheduler_type: constant
logging_steps: 1
save_steps: 2
report_to: none
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def libra(parts):
    return init_libra(parts / "llm", parts / "image_tokenizer")


@pytest.fixture
def samples(icons):
    train, _ = load_caption_data(DataArguments(icons=str(icons), train_samples=40, eval_samples=4))
    return [train[i] for i in range(3)]


@pytest.fixture
def batch(libra, samples):
    """Codes, features and captions; no code is supervised."""
    _, processor = libra
    batch = PretrainCollator(processor, vision_supervision="none")(samples)
    batch.pop("draws")
    return dict(processor.tokenize_images(batch))


def run_pretraining(parts, icons, out, *flags):
    config = out.parent / "pretrain.yaml"
    config.write_text(SETTINGS)
    pretrain.main(
        ["--config", str(config), "--language_model", str(parts / "llm"), "--icons", str(icons),
         "--image_tokenizer", str(parts / "image_tokenizer"), "--output_dir", str(out), *flags]
    )  # fmt: skip
    return out


@pytest.mark.parametrize("supervision", ["none", "features"])
def test_without_codes_the_captions_alone_are_supervised(libra, samples, supervision):
    """Of images, labels have nothing, or the codes in place of the patches that have features."""
    _, processor = libra
    with_codes, without = (PretrainCollator(processor, vision_supervision=s)(samples) for s in ("codes", supervision))
    is_vision = with_codes["labels"] >= processor.text_vocab_size
    assert is_vision.sum() == 3 * (processor.num_image_tokens - 1)  # the codes and EOI
    kept = without["labels"][is_vision]
    if supervision == "none":
        assert (kept == -100).all()
    else:
        assert (kept[kept >= 0] == with_codes["labels"][is_vision][kept >= 0]).all()
        assert (kept == -100).sum() == 3
        assert not (kept == processor.eoi_token_id).any()
    assert torch.equal(with_codes["labels"][~is_vision], without["labels"][~is_vision])
    assert torch.equal(with_codes["input_ids"], without["input_ids"])


def test_codes_are_the_default(libra, samples):
    _, processor = libra
    default, named = (
        PretrainCollator(processor)(samples),
        PretrainCollator(processor, vision_supervision="codes")(samples),
    )
    assert torch.equal(default["labels"], named["labels"])
    arguments = PretrainArguments(language_model="a", image_tokenizer="b")
    assert (arguments.vision_supervision, arguments.vision_system) == ("codes", {})


def test_the_head_regresses_the_next_patch(libra, batch):
    """Against its definition, patch by patch; the first patch is predicted by BOI, and EOI is not."""
    model, _ = libra
    torch.manual_seed(0)
    head = FeatureHead(model.config)
    hidden = torch.randn(*batch["input_ids"].shape, model.config.text_config.hidden_size)
    errors = head(hidden, batch["input_ids"], batch["image_features"])
    expected = []
    for row, features in enumerate(batch["image_features"]):
        begin = batch["input_ids"][row].tolist().index(model.config.boi_token_id)
        for patch, feature in enumerate(features):
            wanted = (feature - feature.mean()) / (feature.var(unbiased=False) + 1e-5).sqrt()
            expected.append(F.mse_loss(head.proj(hidden[row, begin + patch]), wanted))
    assert len(expected) == 3 * model.config.num_patches
    torch.testing.assert_close(errors, torch.stack(expected))


def test_patches_and_words_weigh_the_same(libra, samples, tmp_path):
    """In an evaluation, and in a step that is cut into parts: the parts give the loss of the whole."""
    model, processor = libra
    torch.manual_seed(0)
    model.vision_feature_head = FeatureHead(model.config)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = LibraPretrainer(model.eval(), processor, feature_head=model.vision_feature_head, args=args)

    def loss_of(some, num_items=None):
        batch = PretrainCollator(processor, vision_supervision="features")(some)
        batch.pop("draws")
        with torch.no_grad():
            return trainer.compute_loss(model, dict(processor.tokenize_images(batch)), num_items_in_batch=num_items)

    labels = PretrainCollator(processor, vision_supervision="features")(samples)["labels"]
    num_items = (labels[:, 1:] >= 0).sum()
    whole = loss_of(samples)
    torch.testing.assert_close(loss_of(samples, num_items), whole)
    torch.testing.assert_close(loss_of(samples[:1], num_items) + loss_of(samples[1:], num_items), whole)
    assert FeatureHead.joint_loss(torch.tensor(2.0), torch.full((48,), 5.0), torch.tensor(16)).item() == 4.25


def test_language_supervision_trains_on_captions_alone(libra, batch, samples, tmp_path):
    model, processor = libra
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = LibraPretrainer(model, processor, args=args)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "image_features", "labels")}
    loss, outputs = trainer.compute_loss(model.eval(), inputs, return_outputs=True)
    assert torch.equal(loss, outputs.text_loss)
    logs = {"eval_loss": loss.item()}
    trainer.log(logs)
    assert "eval_text_loss" in logs
    assert not {"eval_vision_loss", "eval_codebook_1_loss", "eval_feature_loss"} & logs.keys()  # no loss of 0 is shown


@pytest.mark.parametrize("supervision", ["none", "features"])
def test_what_a_run_trains_and_leaves(parts, icons, tmp_path, supervision):
    """The vision heads have no part in it, and the head of the regression is not in what is saved."""
    out = run_pretraining(parts, icons, tmp_path / "out", "--max_steps", "2", "--vision_supervision", supervision)
    before, _ = init_libra(parts / "llm", parts / "image_tokenizer", seed=42)
    model, report = LibraForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    after = model.state_dict()
    moved = {name for name, weight in before.state_dict().items() if not torch.equal(weight, after[name])}
    assert any("q_proj.B" in name for name in moved)
    assert all("vision" in name for name in moved)
    assert not any("vision_lm_head" in name for name in moved)
    assert load_libra(out)[0].config.to_dict().keys() == before.config.to_dict().keys() | {"architectures"}


def test_a_stopped_regression_goes_on_with_its_head(parts, icons, tmp_path):
    flags = ("--vision_supervision", "features")
    whole = run_pretraining(parts, icons, tmp_path / "whole", "--max_steps", "4", *flags)
    run_pretraining(parts, icons, tmp_path / "parts", "--max_steps", "2", *flags)
    resumed = run_pretraining(parts, icons, tmp_path / "parts", "--max_steps", "4", *flags)
    expected = LibraForCausalLM.from_pretrained(whole).state_dict()
    for name, value in LibraForCausalLM.from_pretrained(resumed).state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_regression_learns(parts, icons, tmp_path, capsys):
    run_pretraining(parts, icons, tmp_path / "out", "--max_steps", "10", "--vision_supervision", "features")
    lines = [line for line in capsys.readouterr().out.splitlines() if "feature_loss" in line]
    assert "vision_loss" not in "".join(lines)
    first, last = (float(line.split("feature_loss ")[1].split(" ")[0].rstrip(",")) for line in (lines[0], lines[-1]))
    assert last < 0.9 * first


@pytest.mark.parametrize("part", ["use_expert", "use_bridge", "use_continuous_features"])
def test_a_fresh_vision_system_without_a_part(parts, icons, tmp_path, part):
    config = tmp_path / "pretrain.yaml"
    config.write_text(SETTINGS + f"vision_system: {{{part}: false}}\nmax_steps: 1\n")
    pretrain.main(
        ["--config", str(config), "--language_model", str(parts / "llm"), "--icons", str(icons),
         "--image_tokenizer", str(parts / "image_tokenizer"), "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    model, processor = load_libra(tmp_path / "out")
    assert getattr(model.config, part) is False
    assert processor.num_image_tokens == model.config.num_patches + 2


def test_sizes_that_follow_from_the_parts_cannot_be_chosen(parts):
    with pytest.raises(
        ValueError, match="image_grid, use_brigde cannot be chosen for a vision system: only expert_down_r"
    ):
        init_libra(parts / "llm", parts / "image_tokenizer", vision_fields={"image_grid": 3, "use_brigde": False})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_supervision": "pixels"}, "must be one of codes, none, features, found 'pixels'"),
        ({"vision_supervision": "none", "text_to_image_fraction": 0.1}, "images are drawn as codes: set text_to_image"),
        ({"vision_supervision": "features", "text_to_image_fraction": 1.0}, "vision_supervision is features"),
        ({"model": "m", "language_model": "", "image_tokenizer": "", "vision_system": {"use_bridge": False}},
         "that of m is there already"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainArguments(**{"language_model": "a", "image_tokenizer": "b", **settings})


def test_a_smaller_world_shows_its_first_concepts(icons):
    train, validation = load_caption_data(
        DataArguments(icons=str(icons), num_concepts=3, train_samples=60, eval_samples=10, single_fraction=[1.0, 1.0])
    )
    every, _ = load_caption_data(DataArguments(icons=str(icons), train_samples=60, single_fraction=[1.0, 1.0]))
    few = {train[i]["text"] for i in range(60)}
    assert few == {subject.label for subject in every.source.subjects[:3]}
    assert few < {every[i]["text"] for i in range(60)}
    assert len(validation.source.subjects) == 3
    with pytest.raises(ValueError, match="num_concepts must be at least 1, found 0"):
        DataArguments(num_concepts=0)
