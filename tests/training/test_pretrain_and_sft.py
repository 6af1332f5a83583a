"""Stages 1 and 2: what is supervised, what is trained, that a killed run goes on, that the result loads."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, TrainingArguments

from libra_cli.init import init_libra
from modeling_libra import LibraForCausalLM
from processing.image_processing_libra import LibraImageProcessor
from processing.modeling_libra_image_tokenizer import LibraImageTokenizer
from processing.processing_libra import LibraProcessor
from training import pretrain, sft, train_llm
from training.data import DataArguments, load_caption_data, load_conversations
from training.pretrain import LibraPretrainer, PretrainCollator, freeze_language_model

LLM = """
model_config: {vocab_size: 800, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
train_documents: 200
eval_documents: 8
tokenizer_documents: 200
block_size: 64
eval_prompts: 2
max_steps: 1
per_device_train_batch_size: 2
report_to: none
use_cpu: true
disable_tqdm: true
"""

SHORT = """
dataset: world
train_samples: 40
eval_samples: 4
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 2
eval_strategy: steps
eval_steps: 2
report_to: none
use_cpu: true
disable_tqdm: true
seed: 0
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of an untrained language model and an untrained image tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "llm.yaml").write_text(LLM)
    train_llm.main(["--config", str(folder / "llm.yaml"), "--output_dir", str(folder / "llm")])
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    tokenizer = LibraImageTokenizer.from_clip(
        CLIPVisionModel(config), select_layers=[1, 2], embed_dim=16, z_channels=32, ch=32, ch_mult=[1, 1],
        codebook_size=16, num_res_blocks=0, attn_resolutions=[], num_attn_heads=1, resolution=48,
    )  # fmt: skip
    tokenizer.save_pretrained(folder / "image_tokenizer")
    LibraImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(
        folder / "image_tokenizer"
    )
    return folder


@pytest.fixture
def data(icons) -> DataArguments:
    return DataArguments(icons=str(icons), train_samples=40, eval_samples=4)


@pytest.fixture
def libra(parts):
    torch.manual_seed(0)
    return init_libra(parts / "llm", parts / "image_tokenizer")


def run_pretraining(parts, icons, out, *flags):
    config = out.parent / "pretrain.yaml"
    config.write_text(SHORT)
    pretrain.main(
        ["--config", str(config), "--language_model", str(parts / "llm"), "--icons", str(icons),
         "--image_tokenizer", str(parts / "image_tokenizer"), "--output_dir", str(out), *flags]
    )  # fmt: skip
    return out


def test_libra_starts_as_its_language_model(libra, parts):
    model, processor = libra
    text_model = AutoModelForCausalLM.from_pretrained(parts / "llm").eval()
    ids = processor(text="a horse is an animal.", return_tensors="pt")["input_ids"]
    assert torch.equal(model.eval()(ids).logits, text_model(ids).logits)


@pytest.mark.parametrize("draw", [False, True], ids=["image to text", "text to image"])
def test_pretraining_supervises_codes_and_captions(libra, data, draw):
    model, processor = libra
    train, _ = load_caption_data(data)
    samples = [train[i] for i in range(3)]
    batch = PretrainCollator(processor, text_to_image_fraction=float(draw))(samples)
    batch.pop("draws")
    batch = processor.tokenize_images(batch)
    for ids, labels, sample in zip(batch["input_ids"], batch["labels"], samples):
        is_vision = ids >= processor.text_vocab_size
        assert torch.equal(labels[is_vision], ids[is_vision])
        supervised = processor.decode(labels[(labels >= 0) & ~is_vision]).replace(processor.tokenizer.bos_token, "")
        assert supervised.strip() == ("" if draw else sample["text"] + processor.tokenizer.eos_token)
    loss = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "image_features", "labels")}).loss
    assert loss.isfinite()


def test_text_to_image_samples_lose_their_features(libra, data, tmp_path):
    model, processor = libra
    train, _ = load_caption_data(data)
    trainer = LibraPretrainer(model, processor, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    for fraction in (0.0, 1.0):
        batch = PretrainCollator(processor, fraction)([train[i] for i in range(3)])
        features = trainer._prepare_inputs(batch)["image_features"]
        assert (features == 0).all() == (fraction == 1.0)


def test_an_empty_caption_is_refused(libra, data):
    sample = load_caption_data(data)[0][0]
    with pytest.raises(ValueError, match="Sample 1 of the batch has an empty caption"):
        PretrainCollator(libra[1])([sample, {**sample, "text": " "}])


def test_pretraining_leaves_the_language_model_untouched(parts, icons, tmp_path):
    out = run_pretraining(parts, icons, tmp_path / "out", "--max_steps", "2", "--text_to_image_fraction", "0.3")
    torch.manual_seed(0)
    before, _ = init_libra(parts / "llm", parts / "image_tokenizer")
    after = LibraForCausalLM.from_pretrained(out).state_dict()
    for name, value in before.state_dict().items():
        if "vision" not in name:
            assert torch.equal(value, after[name]), name
    moved = [name for name, p in before.named_parameters() if "vision" in name and not torch.equal(p, after[name])]
    assert any("bridge" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)
    assert LibraProcessor.from_pretrained(out).text_vocab_size == before.config.text_vocab_size


def test_a_stopped_pretraining_goes_on_as_if_it_had_not_stopped(parts, icons, tmp_path):
    constant = ("--lr_scheduler_type", "constant")  # else the schedule would depend on max_steps
    whole = run_pretraining(parts, icons, tmp_path / "whole", "--max_steps", "4", *constant)
    run_pretraining(parts, icons, tmp_path / "parts", "--max_steps", "2", *constant)
    resumed = run_pretraining(parts, icons, tmp_path / "parts", "--max_steps", "4", *constant)
    expected = LibraForCausalLM.from_pretrained(whole).state_dict()
    for name, value in LibraForCausalLM.from_pretrained(resumed).state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_only_the_vision_system_is_trainable(libra):
    model, _ = libra
    trainable, frozen = freeze_language_model(model)
    assert trainable == sum(p.numel() for n, p in model.named_parameters() if "vision" in n)
    assert frozen == sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()


def test_the_frozen_language_model_has_no_optimizer_state(libra, data, tmp_path):
    model, processor = libra
    freeze_language_model(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, remove_unused_columns=False,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = LibraPretrainer(
        model, processor, args=args, data_collator=PretrainCollator(processor), train_dataset=load_caption_data(data)[0]
    )
    trainer.train()
    assert {"text_loss", "vision_loss"} <= trainer.state.log_history[0].keys()
    vision = {name for name in before if "vision" in name}
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = trainer.optimizer.state_dict()["state"]
    assert len(state) == len(vision)
    given = {names[parameter] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert given == vision
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in vision), name


def test_conversations_supervise_answers_only(libra, data):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    _, processor = libra
    train, _ = load_conversations(data)
    samples = [train[i] for i in range(6)]
    collator = DataCollatorForVisionLanguageModeling(processor, max_length=None, assistant_only_loss=True)
    batch = collator([{**sample, "messages": list(sample["messages"])} for sample in samples])
    assert (batch["labels"] < processor.text_vocab_size).all()
    for labels, sample in zip(batch["labels"], samples):
        answers = [turn["content"] for turn in sample["messages"] if turn["role"] == "assistant"]
        supervised = processor.decode(labels[labels >= 0])
        assert [part.strip() for part in supervised.split(processor.tokenizer.eos_token)] == [*answers, ""]


def test_the_world_asks_the_same_at_every_run(data):
    first, second = (load_conversations(data)[0] for _ in range(2))
    assert first[3]["messages"] == second[3]["messages"]
    assert np.array_equal(np.asarray(first[3]["images"][0]), np.asarray(second[3]["images"][0]))


def test_instruction_tuning_trains_everything_but_clip(parts, icons, tmp_path):
    start = run_pretraining(parts, icons, tmp_path / "pretrain", "--max_steps", "1")
    (tmp_path / "sft.yaml").write_text(SHORT + "bf16: false\ngradient_checkpointing: false\nmax_length: 512\n")
    sft.main(
        ["--config", str(tmp_path / "sft.yaml"), "--model", str(start), "--icons", str(icons), "--max_steps", "2",
         "--output_dir", str(tmp_path / "sft")]
    )  # fmt: skip
    before, after = (LibraForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("pretrain", "sft"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model.layers.0" in name for name in moved)
    assert any("vision_model.layers.0" in name for name in moved)
    tokenizers = [LibraProcessor.from_pretrained(tmp_path / name).image_tokenizer for name in ("pretrain", "sft")]
    weights = [tokenizer.state_dict() for tokenizer in tokenizers]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_dataset_without_messages_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"lacks the columns \['images', 'messages'\]"):
        load_conversations(DataArguments(dataset=str(tmp_path)))
