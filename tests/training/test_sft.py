"""Instruction tuning end to end: LLaVA's json through our stage, and TRL's own trainer without us."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from trl import SFTConfig, SFTTrainer

from libra_cli.loading import load_libra
from tests.conftest import REPOSITORY
from training import sft
from training.adapters import AdapterArguments
from training.answers import AnswerCollator, supervised_texts
from training.conversations import ConversationArguments, read_conversations
from training.data import DataArguments
from training.run import StageParser, check_global_batch
from training.sft import LibraSFTTrainer

QUICK = """
per_device_train_batch_size: 3
logging_steps: 1
save_strategy: "no"
report_to: none
use_cpu: true
bf16: false
disable_tqdm: true
gradient_checkpointing: false
shuffle_dataset: false
"""
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A json file in LLaVA's form beside its images: one turn, several turns, text only."""
    folder = tmp_path_factory.mktemp("llava")
    samples = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
        turns = ["<image>\nWhat colour?", name, "Sure?", "Yes"][: 4 if name == "red" else 2]
        talk = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        samples.append({"id": name, "image": f"{name}.png", "conversations": talk})
    talk = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello!"}]
    samples.append({"id": "text", "conversations": talk})
    (folder / "llava.json").write_text(json.dumps(samples))
    return folder / "llava.json"


def tune(repo, data, out, *flags, max_steps=2):
    """Runs the stage as the command line does."""
    (out.parent / "sft.yaml").write_text(QUICK)
    options = {"config": out.parent / "sft.yaml", "model": repo, "dataset": data, "output_dir": out}
    sft.main(
        [*(str(x) for name, x in options.items() for x in (f"--{name}", x)), "--max_steps", str(max_steps), *flags]
    )
    return out


def losses(out) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_llavas_json_is_learned(repo, llava, tmp_path):
    out = tune(repo, llava, tmp_path / "out", "--learning_rate", "3e-3", max_steps=12)
    found = losses(out)
    assert np.isfinite(found).all()
    assert found[-1] < 0.5 * found[0]
    before, _ = load_libra(repo)
    after, processor = load_libra(out)
    start, layers = before.state_dict(), before.config.text_config.num_hidden_layers
    still = {name for name, p in after.named_parameters() if torch.equal(p, start[name])}
    # Answers are text: no code is predicted, so the last layer's image rows are needed for their keys and values only.
    idle = (f"model.vision_model.layers.{layers - 1}.", "model.vision_model.norm", "vision_lm_head")
    assert {name for name in still if not name.startswith(idle)} == set()
    assert processor.text_vocab_size == before.config.text_vocab_size


def test_workers_read_the_same(repo, llava, tmp_path):
    """They open images and stop at pixels; the image tokenizer stays with the trainer."""
    found = [
        losses(tune(repo, llava, tmp_path / name, "--dataloader_num_workers", workers))
        for name, workers in (("alone", "0"), ("workers", "2"))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("adapter", [(), ("--lora_target", "both", "--lora_rank", "4")], ids=["all weights", "LoRA"])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(repo, llava, tmp_path, adapter):
    constant = ("--lr_scheduler_type", "constant", "--save_strategy", "steps", "--save_steps", "2", *adapter)
    whole = tune(repo, llava, tmp_path / "whole", *constant, max_steps=4)
    tune(repo, llava, tmp_path / "parts", *constant, max_steps=2)
    resumed = tune(repo, llava, tmp_path / "parts", *constant, max_steps=4)
    expected = load_libra(whole)[0].state_dict()
    for name, value in load_libra(resumed)[0].state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_a_wrong_file_stops_before_the_model_is_loaded(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "conversations": [{"from": "gpt", "value": "b"}]}]))
    with pytest.raises(ValueError, match=r"Sample 0 \(id 'a'\) has no answer"):
        tune(repo, tmp_path / "data.json", tmp_path / "out")


def test_a_sample_that_max_length_leaves_without_an_answer_is_named(repo, llava, tmp_path):
    with pytest.raises(ValueError, match=r"4 of the 4 .* \(4 too long\)\. Sample 0 \(id 'red'\) needs \d+ tokens"):
        tune(repo, llava, tmp_path / "out", "--max_length", "20")


def test_the_batch_of_the_paper_is_checked(repo, llava, tmp_path):
    with pytest.raises(ValueError, match="global_batch_size is 128"):
        tune(repo, llava, tmp_path / "out", "--global_batch_size", "128")


@pytest.fixture
def config(tmp_path):
    def make(**options):
        return SFTConfig(
            str(tmp_path / "out"), max_steps=8, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1,
            save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            gradient_checkpointing=False, max_length=250, **options,
        )  # fmt: skip

    return make


def own_loss(model, inputs):
    return model(**{name: value for name, value in inputs.items() if name not in ("use_cache",)}).loss


def test_trls_loss_is_our_own(repo, llava, config):
    """Over the answers alone both losses are the mean of the same cross entropies."""
    model, processor = load_libra(repo)
    data = read_conversations(str(llava), ConversationArguments())
    trainer = LibraSFTTrainer(
        model, processor, args=config(remove_unused_columns=False, assistant_only_loss=True),
        data_collator=AnswerCollator(processor), train_dataset=data,
    )  # fmt: skip
    inputs = trainer._prepare_inputs(AnswerCollator(processor)([data[i] for i in range(4)]))
    expected = own_loss(model.eval(), inputs)
    torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), expected)


def assistant_data() -> Dataset:
    """Text and images, several turns, one sample of text alone."""
    rows = [
        [("user", "What colour?"), ("assistant", "red"), ("user", "Sure?"), ("assistant", "Yes")],
        [("user", "Hello?"), ("assistant", "Hello!")],
        [("user", "What colour?"), ("assistant", "blue")],
    ]
    messages = [[{"role": role, "content": text} for role, text in row] for row in rows]
    images = [[Image.new("RGB", (32, 32), c)] for c in COLOURS.values()]
    images[1] = []
    features = Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "images": List(ImageFeature())}
    )
    return Dataset.from_dict({"messages": messages, "images": images}, features=features)


def completion_data() -> Dataset:
    """The same as prompts and completions; of several turns the last answer alone is supervised."""
    data = assistant_data()
    return data.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
    )


@pytest.mark.parametrize(
    ("data", "options", "answers"),
    [
        (assistant_data, {"assistant_only_loss": True}, [["red", "Yes"], ["Hello!"], ["blue"]]),
        (completion_data, {}, [["Yes"], ["Hello!"], ["blue"]]),
    ],
    ids=["assistant_only_loss", "prompt/completion"],
)
def test_the_unmodified_trainer(repo, config, data, options, answers):
    model, processor = load_libra(repo)
    data = data()
    trainer = SFTTrainer(model, args=config(**options), train_dataset=data, processing_class=processor)
    batch = trainer.data_collator([copy.deepcopy(data[i]) for i in range(3)])
    for labels, expected in zip(batch["labels"], answers):
        assert [text.replace("</s>", "").strip() for text in supervised_texts(processor, labels)] == expected
        assert (labels < processor.text_vocab_size).all()  # no image token
    expected = own_loss(model.eval(), batch)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.isfinite(found).all()
    assert found[-1] < 0.7 * found[0]


def test_the_unmodified_trainer_gives_the_labels_of_our_stage(repo, config):
    model, processor = load_libra(repo)
    data = assistant_data()
    trainer = SFTTrainer(model, args=config(assistant_only_loss=True), train_dataset=data, processing_class=processor)
    theirs = trainer.data_collator([copy.deepcopy(data[i]) for i in range(3)])
    ours = processor.tokenize_images(AnswerCollator(processor)([data[i] for i in range(3)]))
    assert theirs.keys() == ours.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], msg=name)


@pytest.mark.parametrize(
    ("data", "options", "answers"),
    [(assistant_data, {"assistant_only_loss": True}, ["red", "Yes"]), (completion_data, {}, ["Yes"])],
    ids=["assistant_only_loss", "prompt/completion"],
)
def test_the_unmodified_trainer_on_text_alone(repo, config, data, options, answers):
    model, processor = load_libra(repo)
    data = data().remove_columns("images")
    trainer = SFTTrainer(model, args=config(**options), train_dataset=data, processing_class=processor)
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"][0]
    assert [text.replace("</s>", "").strip() for text in supervised_texts(processor, labels)] == answers
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < 0.7 * found[0]


def test_the_unmodified_trainer_given_a_path(repo, config):
    """Model and processor from the repository's own code."""
    args = config(assistant_only_loss=True, trust_remote_code=True)
    trainer = SFTTrainer(str(repo), args=args, train_dataset=assistant_data())
    assert type(trainer.model).__module__.startswith("transformers_modules")
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < 0.7 * found[0]


CONFIGS = REPOSITORY / "training" / "configs"
STAGE = (sft.SFTArguments, DataArguments, ConversationArguments, AdapterArguments, SFTConfig)


@pytest.mark.parametrize("name", ["sft_11b", "sft_lora_11b", "sft_qlora_11b", "tiny/sft"])
def test_the_shipped_configurations(name, tmp_path):
    """All options exist, and those for one device make the batch they ask for."""
    flags = ["--config", str(CONFIGS / f"{name}.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    stage, _, _, adapter, args = StageParser("sft", STAGE).parse_args_and_config(flags)
    assert args.adam_epsilon == 1e-8
    assert (adapter.lora_target, adapter.load_in_4bit) == {
        "sft_lora_11b": ("both", False), "sft_qlora_11b": ("both", True)
    }.get(name, (None, False))  # fmt: skip
    if adapter.lora_target:
        check_global_batch(args, stage.global_batch_size)


def test_the_papers_table_4(tmp_path):
    flags = ["--config", str(CONFIGS / "sft_11b.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    stage, *_, args = StageParser("sft", STAGE).parse_args_and_config(flags)
    assert (args.max_steps, args.warmup_steps, stage.global_batch_size) == (7000, 300, 128)
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay) == (2e-5, "cosine", 0.01)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0.9, 0.99, 1e-8, 1.0)
    assert args.optim.startswith("adamw_torch")
    assert args.bf16
