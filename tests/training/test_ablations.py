"""`make ablations`: all variants at toy size, what is repeated and what is not, and a run that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments

from libra_cli.loading import load_libra
from tests.conftest import REPOSITORY
from tests.training.libra_parts import SMALL_TOKENIZER
from training import ablations, train_image_tokenizer, train_llm
from training import pretrain as pretraining
from training.ablations import VARIANTS, main, plan, run_step
from training.caption_stream import CaptionArguments
from training.data import DataArguments
from training.run import StageParser

STAGES = {"training.train_llm": train_llm, "training.train_image_tokenizer": train_image_tokenizer,
          "training.pretrain": pretraining}  # fmt: skip
PARSERS = {
    "training.train_llm": StageParser("llm", (train_llm.LlmArguments, TrainingArguments)),
    "training.train_image_tokenizer": StageParser(
        "tokenizer", (train_image_tokenizer.ImageTokenizerArguments, TrainingArguments)
    ),
    "training.pretrain": StageParser(
        "pretrain", (pretraining.PretrainArguments, DataArguments, CaptionArguments, TrainingArguments)
    ),
}
SHORT = {
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
CONFIGS = {
    "llm": {
        "model_config": {
            "vocab_size": 800,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "train_documents": 200,
        "eval_documents": 8,
        "tokenizer_documents": 200,
        "block_size": 64,
        "eval_prompts": 0,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
    },
    "image_tokenizer": {
        "tokenizer_config": SMALL_TOKENIZER | {"resolution": 96},
        "perceptual": "none",
        "other_emoji": False,
        "eval_samples": 2,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
    },
    "pretrain": {
        "dataset": "world",
        "num_concepts": 4,
        "single_fraction": [1.0, 1.0],
        "train_samples": 40,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
    },
}


@pytest.fixture
def configs(tmp_path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, settings in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(SHORT | settings))
    return folder


@pytest.fixture
def stages(monkeypatch) -> list[str]:
    """Stages run in this process, which spares importing torch for each; their folders are listed."""
    run: list[str] = []

    def run_stage(module: str, config: Path) -> None:
        run.append(config.parent.name)
        STAGES[module].main(["--config", str(config)])

    monkeypatch.setattr(ablations, "run_stage", run_stage)
    return run


def options(tmp_path, configs, icons, *more: str) -> list[str]:
    return ["--output", str(tmp_path / "out"), "--configs", str(configs), "--icons", str(icons), *more]


def test_all_variants_are_trained_measured_and_compared(tmp_path, configs, icons, stages, capsys):
    main(options(tmp_path, configs, icons, "--seeds", "0"))
    names = [variant.name for variant in VARIANTS]
    shared = ["llm", "tokenizer"]
    assert stages == [*shared, *(f"{name}-seed0" for name in names[:-1]), "tokenizer-fresh-seed0", f"{names[-1]}-seed0"]
    out = tmp_path / "out"
    for name in names:
        numbers = json.loads((out / f"{name}-seed0" / "evaluation.json").read_text())
        assert numbers.keys() == {"train_vendors", "unseen_vendor", "chance", "text_loss", "vision_loss"}
        assert numbers["chance"] == 1 / 4
        assert 0 <= numbers["train_vendors"] <= 1
        assert numbers["text_loss"] > 0
    report = (out / "ABLATIONS.md").read_text()
    assert all(f"| {variant.title} | 1 |" in report for variant in VARIANTS)
    assert report.count("; named, ") == 2 * (len(VARIANTS) - 1)
    assert "2 layers of width 32, 1 steps" in report

    configurations = {name: load_libra(out / f"{name}-seed0")[0].config for name in names}
    for switch, name in {"expert": "no-expert", "bridge": "no-bridge", "continuous_features": "discrete-input"}.items():
        off = [name for name, config in configurations.items() if not getattr(config, f"use_{switch}")]
        assert off == [name]
    given, trained, fresh = (encoder_weight(out / name) for name in ("clip", "tokenizer", "tokenizer-fresh-seed0"))
    assert torch.equal(given, trained)
    assert not torch.allclose(given, fresh, atol=1e-2)

    stages.clear()
    (out / "ABLATIONS.md").unlink()
    main(options(tmp_path, configs, icons, "--seeds", "0"))
    assert stages == []  # nothing is repeated
    assert "11 of 11 runs are done." in capsys.readouterr().out
    assert (out / "ABLATIONS.md").read_text() == report
    main(options(tmp_path, configs, icons, "--seeds", "0", "1", "--variants", "full", "no-bridge"))
    assert stages == ["full-seed1", "no-bridge-seed1"]  # more seeds are added to what is there
    assert "| full model | 2 |" in (out / "ABLATIONS.md").read_text()


def encoder_weight(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "model.safetensors")
    return next(weight for name, weight in weights.items() if name.endswith("encoder.layers.0.mlp.fc1.weight"))


def test_each_variant_changes_one_thing(configs, icons):
    steps = plan(Path("out"), configs, list(VARIANTS), [3], icons)
    settings = {step.variant.name: step.settings for step in steps if step.variant}
    full = settings.pop("full")
    assert full["seed"] == 3
    changed = {name: {key for key in one | full if one.get(key) != full.get(key)} for name, one in settings.items()}
    assert changed == {
        "language-supervision": {"vision_supervision"},
        "contiguous-supervision": {"vision_supervision"},
        "less-data": {"train_samples"},
        "no-expert": {"vision_system"},
        "no-bridge": {"vision_system"},
        "discrete-input": {"vision_system"},
        "fresh-encoder": {"image_tokenizer"},
    }
    assert settings["less-data"]["train_samples"] == full["train_samples"] // 10
    frozen, fresh = (step.settings for step in steps if step.module.endswith("image_tokenizer"))
    assert fresh == frozen | {"encoder_from_scratch": True, "seed": 3}


def test_the_shipped_configurations(icons, tmp_path):
    """Every setting is one of its stage; the full model sees every scene once, and a tenth of them are seen ten times."""
    samples = {}
    for step in plan(tmp_path, ablations.CONFIGS, list(VARIANTS), [0], icons):
        config = tmp_path / f"{step.folder.name}.yaml"
        config.write_text(yaml.safe_dump(step.settings | {"output_dir": str(step.folder)}))
        parsed = PARSERS[step.module].parse_args_and_config(["--config", str(config)], fail_with_unknown_args=True)
        if step.variant:
            data, args = parsed[1], parsed[-1]
            samples[step.variant.name] = data.train_samples / (args.max_steps * args.per_device_train_batch_size)
    assert {name for name, share in samples.items() if share == 1} == samples.keys() - {"less-data"}
    assert samples["less-data"] == 0.1


def test_a_failed_run_is_named_and_taken_up_again(tmp_path, configs, icons, stages, monkeypatch):
    arguments = options(tmp_path, configs, icons, "--variants", "full", "no-bridge", "--seeds", "0")
    working = ablations.run_stage

    def failing(module, config):
        if config.parent.name == "no-bridge-seed0":
            raise SystemExit("no-bridge-seed0 failed with exit code 1")
        working(module, config)

    monkeypatch.setattr(ablations, "run_stage", failing)
    with pytest.raises(SystemExit, match="no-bridge-seed0 failed"):
        main(arguments)
    assert "| full model | 1 |" in (tmp_path / "out" / "ABLATIONS.md").read_text()  # what is there is reported
    stages.clear()
    monkeypatch.setattr(ablations, "run_stage", working)
    main(arguments)
    assert stages == ["no-bridge-seed0"]
    assert "one seed shows nothing" in (tmp_path / "out" / "ABLATIONS.md").read_text()


def test_a_run_that_was_not_measured_is_measured_and_not_trained_again(
    tmp_path, configs, icons, stages, monkeypatch, capsys
):
    arguments = options(tmp_path, configs, icons, "--variants", "full", "--seeds", "0")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ablations, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    before = load_file(tmp_path / "out" / "full-seed0" / "model.safetensors")
    capsys.readouterr()
    main(arguments)
    assert "All 2 steps are done; nothing is left to train." in capsys.readouterr().out
    after = load_file(tmp_path / "out" / "full-seed0" / "model.safetensors")
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert (tmp_path / "out" / "full-seed0" / "evaluation.json").is_file()


def test_a_folder_of_other_settings_is_refused(tmp_path, configs, icons, stages):
    step = plan(tmp_path / "out", configs, list(VARIANTS), [0], icons)[0]
    run_step(step, icons)
    changed = type(step)(step.folder, step.module, step.settings | {"max_steps": 7}, "other.json")
    with pytest.raises(SystemExit, match="llm was started with other settings"):
        run_step(changed, icons)


def test_a_killed_command_goes_on_where_it_was(tmp_path, configs, icons):
    """In real processes: killed in the middle of pretraining, the weights are those of a command that was not."""
    (configs / "pretrain.yaml").write_text(yaml.safe_dump(SHORT | CONFIGS["pretrain"] | {"max_steps": 12}))
    only = ("--variants", "full", "--seeds", "0")
    arguments = [sys.executable, "-m", "training.ablations", *options(tmp_path, configs, icons, *only)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = tmp_path / "out" / "full-seed0"
    process = subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 1200
        while not any(run.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "model.safetensors").exists()
    result = subprocess.run(arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 of 3 runs are done." in result.stdout
    assert "  start: from checkpoint-" in result.stdout
    pretraining.main(["--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "unbroken")])
    expected = load_file(tmp_path / "unbroken" / "model.safetensors")
    found = load_file(run / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
