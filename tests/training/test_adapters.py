"""LoRA and QLoRA: what is trained, what is not, and that merged, saved and reloaded models answer the same."""

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import SFTConfig

from libra_cli.adapters import QUANTIZATION_CONFIG
from libra_cli.export import export_folder
from libra_cli.loading import load_libra, load_model
from libra_cli.main import main as libra
from tests.conftest import REPOSITORY
from training import sft
from training.adapters import AdapterArguments
from training.answers import AnswerCollator
from training.sft import LibraSFTTrainer, describe_trained

TARGETS = ["language", "vision", "both"]
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What colour?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]


def sample() -> dict:
    return {"id": "red", "messages": MESSAGES, "images": [Image.new("RGB", (32, 32), (255, 0, 0))]}


def text_sample() -> dict:
    messages = [MESSAGES[0] | {"content": MESSAGES[0]["content"][1:]}, MESSAGES[1]]
    return {"id": "text", "messages": messages, "images": []}


@pytest.fixture
def tune(repo, tmp_path):
    """Tunes an adapter for a few steps; returns the trainer, whose model is the tuned one, and the adapter's folder."""

    def run(target: str, four_bits: bool = False, steps: int = 3, sample=sample, **options):
        adapter = AdapterArguments(lora_target=target, lora_rank=4, load_in_4bit=four_bits)
        options = {"bf16": four_bits, "gradient_checkpointing": False} | options
        args = SFTConfig(
            str(tmp_path / "adapter"), max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-2,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False, assistant_only_loss=True, **options,
        )  # fmt: skip
        _, processor = load_libra(repo)
        data = Dataset.from_dict({"row": [0]}).with_transform(
            lambda rows: {name: [value] * len(rows["row"]) for name, value in sample().items()}
        )
        trainer = LibraSFTTrainer(
            load_model(repo, **adapter.loading_options(args)), processor, args=args, train_dataset=data,
            data_collator=AnswerCollator(processor), peft_config=adapter.peft_config(),
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        return trainer, tmp_path / "adapter"

    return run


def inputs_of(processor) -> dict:
    batch = processor.tokenize_images(AnswerCollator(processor)([sample()]))
    batch.pop("labels")
    return dict(batch)


def outputs(model, inputs) -> list[torch.Tensor]:
    """Logits of both kinds of heads. In training mode, where bitsandbytes computes alike on every CPU."""
    with torch.no_grad():
        output = model.train()(**inputs)
    return [output.logits.float(), output.vision_logits.float()]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_trained(tune, target):
    trainer, _ = tune(target, steps=1)
    trained = {name.split("base_model.model.")[1] for name, p in trainer.model.named_parameters() if p.requires_grad}
    language = {name for name in trained if "vision" not in name}
    assert bool(language) == (target != "vision")
    assert bool(trained - language) == (target != "language")
    assert all("lora_" in name for name in language)
    whole = {name.split(".modules_to_save")[0] for name in trained if "modules_to_save" in name}
    kinds = {name.rpartition(".")[2] for name in whole}
    bridges = {f"{kind}_bridge_on_{side}" for kind in "kv" for side in ("vision", "language")}
    assert kinds == (set() if target == "language" else bridges | {"embedding"})
    assert not any("lm_head" in name for name in trained)
    low_rank = {name.split(".lora_")[0].split(".layers.")[1].split(".", 1)[1] for name in trained if "lora_" in name}
    maps = {*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))}
    halves = {f"{name}.{half}" for name in maps for half in "AB"}
    assert low_rank == {"language": maps, "vision": halves, "both": maps | halves}[target]
    counts = [sum(p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad and ("vision" in n) == vision)
              for vision in (False, True)]  # fmt: skip
    assert describe_trained(trainer.model) == (
        f"Training {counts[0]:,} parameters of the language model and {counts[1]:,} of the vision system."
    )


@pytest.mark.parametrize(("target", "checkpointing"), [("language", False), ("vision", True), ("both", True)])
def test_merged_saved_and_reloaded_it_answers_the_same(tune, repo, tmp_path, target, checkpointing):
    trainer, folder = tune(target, gradient_checkpointing=checkpointing)
    inputs = inputs_of(trainer.processing_class)
    expected = outputs(trainer.model, inputs)
    start = load_model(repo)
    assert not torch.allclose(outputs(start, inputs)[0], expected[0], atol=1e-2)
    merged, processor = load_libra(folder)
    exported, _ = load_libra(export_folder(folder, tmp_path / "repo"))
    for model in (merged, exported):
        for found, wanted in zip(outputs(model, inputs), expected):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert model.state_dict().keys() == start.state_dict().keys()
    assert processor.text_vocab_size == trainer.processing_class.text_vocab_size
    untouched = {"language": "vision", "vision": "language_model", "both": "lm_head"}[target]
    for name, weight in start.state_dict().items():
        if untouched in name or "lm_head" in name:
            assert torch.equal(exported.state_dict()[name], weight), name


@pytest.mark.parametrize(("target", "four_bits"), [("vision", False), ("both", False), ("both", True)])
def test_batches_without_images(tune, target, four_bits):
    """Of them the vision system learns nothing, but its adapter takes part: other processes may have images."""
    if four_bits:
        pytest.importorskip("bitsandbytes")
    trainer, _ = tune(target, four_bits, steps=1, sample=text_sample, gradient_checkpointing=True)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["loss"] > 1
    assert (entry["grad_norm"] > 0) == (target == "both")


def test_a_checkpoint_is_an_adapter_too(tune, tmp_path):
    trainer, folder = tune("language")
    trainer._save_checkpoint(trainer.model, trial=None)
    inputs = inputs_of(trainer.processing_class)
    (checkpoint,) = folder.glob("checkpoint-*")
    for found, wanted in zip(outputs(load_libra(checkpoint)[0], inputs), outputs(trainer.model, inputs)):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_command_exports_an_adapter(tune, tmp_path, capsys):
    tune("vision", steps=1)
    assert libra(["export", str(tmp_path / "adapter"), str(tmp_path / "repo")]) == 0
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "peft" not in card
    assert not (tmp_path / "repo" / "adapter_config.json").exists()


def test_the_small_updates_of_whole_modules_are_not_rounded_away(tune):
    """The frozen weights are bfloat16 under bf16, but nothing that is trained is."""
    trainer, _ = tune("both", steps=1, bf16=True)
    dtypes = {p.requires_grad: set() for p in trainer.model.parameters()}
    for parameter in trainer.model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes[True] == {torch.float32}
    originals = {p.dtype for n, p in trainer.model.named_parameters() if "lora_" not in n and "_to_save" not in n}
    assert originals == {torch.bfloat16}


def test_full_tuning_has_float32_weights():
    args = TrainingArguments(bf16=True, use_cpu=True, report_to="none")
    assert AdapterArguments().loading_options(args) == {"dtype": torch.float32}
    assert AdapterArguments().peft_config() is None


def test_an_adapter_without_its_base_is_refused(tune, repo):
    _, folder = tune("language", steps=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(repo)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(ValueError, match=r"was trained on the model '/gone', which is not there. Set base_model_name"):
        load_libra(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_target": "audio"}, "lora_target is 'audio'; choose of language, vision, both"),
        ({"lora_target": "both", "lora_rank": 0}, r"lora_rank \(0\)"),
        ({"load_in_4bit": True}, "load_in_4bit needs lora_target"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        AdapterArguments(**options)


@pytest.fixture
def qlora_run(repo, tmp_path):
    """The stage with QLoRA, on data that do not exist: nothing may be read before the packages are checked."""

    def run(*flags: str):
        options = {"model": repo, "dataset": tmp_path / "gone.json", "output_dir": tmp_path / "out"}
        arguments = [str(x) for name, x in options.items() for x in (f"--{name}", x)]
        sft.main([*arguments, "--lora_target", "both", "--load_in_4bit", "true", "--bf16", "false", *flags])

    return run


def test_qlora_without_bitsandbytes_is_refused_at_once(qlora_run, monkeypatch):
    monkeypatch.setattr("training.adapters.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"bitsandbytes, which is not installed. Run: pip install 'libra-vlm\[qlora\]'"
    ):
        qlora_run("--use_cpu", "true")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_qlora_without_a_gpu_is_refused_at_once(qlora_run):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="load_in_4bit needs a GPU, and torch finds none"):
        qlora_run()


def test_the_stage_with_qlora(repo, tmp_path, capsys):
    """From the command line, with TRL's defaults (bf16, checkpointing), stopped and going on."""
    pytest.importorskip("bitsandbytes")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "data.json").write_text(json.dumps([{"id": "red", "image": "red.png", "conversations": turns}]))
    options = {
        "model": repo, "dataset": tmp_path / "data.json", "output_dir": tmp_path / "out", "lora_target": "both",
        "load_in_4bit": "true", "use_cpu": "true", "bf16": "true", "disable_tqdm": "true", "logging_steps": "1",
        "save_steps": "1", "report_to": "none", "learning_rate": "1e-2", "per_device_train_batch_size": "1",
    }  # fmt: skip
    flags = [str(x) for name, x in options.items() for x in (f"--{name}", x)]
    for steps in ("2", "3"):
        sft.main([*flags, "--max_steps", steps])
    printed = capsys.readouterr().out
    assert "start: from checkpoint-2" in printed
    steps = [line for line in printed.splitlines() if "| loss" in line]
    assert [line.split()[1] for line in steps] == ["1/2", "2/2", "3/3"]
    load_libra(tmp_path / "out")
    assert (tmp_path / "out" / QUANTIZATION_CONFIG).is_file()


def test_an_adapter_is_no_model_to_tune(tune):
    _, folder = tune("language", steps=1)
    with pytest.raises(ValueError, match=r"is an adapter, not a whole model; merge it first: libra export"):
        sft.main(["--model", str(folder), "--output_dir", str(folder), "--bf16", "false", "--use_cpu", "true"])


def test_qlora_quantizes_what_is_frozen_and_large(tune):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    trainer, _ = tune("both", four_bits=True, steps=1)
    found = {
        name.split("base_model.model.")[1].removesuffix(".base_layer"): isinstance(module, bitsandbytes.nn.Linear4bit)
        for name, module in trainer.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and "_to_save" not in name
    }
    exact = {name for name, quantized in found.items() if not quantized}
    assert all("lm_head" in name or "_bridge_on_" in name or "embedding" in name for name in exact)
    layers = {name.split(".layers.")[0] for name, quantized in found.items() if quantized}
    assert layers == {"model.language_model", "model.vision_model"}
    config = trainer.model.config.quantization_config
    assert isinstance(config, BitsAndBytesConfig)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(("target", "bf16"), [("language", False), ("vision", False), ("both", True)])
def test_qlora_merged_saved_and_reloaded_answers_the_same(tune, repo, tmp_path, target, bf16):
    """As the tuned model, whose base is rounded: a merge into the base as it was answers otherwise."""
    pytest.importorskip("bitsandbytes")
    trainer, folder = tune(target, four_bits=True, bf16=bf16)
    assert (folder / QUANTIZATION_CONFIG).is_file()
    inputs = inputs_of(trainer.processing_class)
    expected = outputs(trainer.model, inputs)[0]
    exported, _ = load_libra(export_folder(folder, tmp_path / "repo"))
    assert not hasattr(exported.config, "quantization_config")
    finite = expected.isfinite()
    error = (outputs(exported, inputs)[0] - expected)[finite].abs().mean()
    (folder / QUANTIZATION_CONFIG).unlink()
    plain = (outputs(load_libra(folder)[0], inputs)[0] - expected)[finite].abs().mean()
    scale = expected[finite].abs().mean()
    assert error < (0.03 if bf16 else 0.01) * scale  # rounding to bfloat16, and that of TRL's bfloat16 adapters
    assert plain > 0.2 * scale


def test_an_adapter_of_4_bits_needs_bitsandbytes(tune, monkeypatch):
    pytest.importorskip("bitsandbytes")
    _, folder = tune("language", four_bits=True, steps=1)
    real = sys.modules["libra_cli.adapters"].find_spec
    monkeypatch.setattr("libra_cli.adapters.find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(ValueError, match=r"in 4 bits; to read it, bitsandbytes is needed"):
        load_libra(folder)


@pytest.mark.parametrize("target", ["both"])
def test_peft_puts_it_on_the_remote_code_model(tune, repo, tmp_path, target):
    """In a process without this package; then merged."""
    trainer, folder = tune(target)
    inputs = inputs_of(trainer.processing_class)
    save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "inputs.safetensors")
    script = REPOSITORY / "tests" / "hub" / "fresh_adapter.py"
    result = subprocess.run(
        [sys.executable, script, repo, folder, tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"],
        cwd=tmp_path, env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
    for name in ("adapter", "merged"):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["base"], expected, atol=1e-2)
    assert found["written"].shape[1] > inputs["input_ids"].shape[1]
