"""`libra train STAGE`: the options of the stage, its help, and what is said to mistakes."""

import pytest

from libra_cli import main as cli
from libra_cli.main import TRAINING_STAGES, main

TINY = """
model_config: {vocab_size: 640, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
train_documents: 400
eval_documents: 20
tokenizer_documents: 400
block_size: 64
eval_prompts: 0
max_steps: 3
per_device_train_batch_size: 2
logging_steps: 1
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with exit code 2 and one line on stderr; returns the line."""

    def run(*arguments: str) -> str:
        assert main(["train", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("libra: error: ")
        return line

    return run


def stopped(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that argparse ends."""
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_a_stage_reads_its_file_and_its_flags(tmp_path, capsys):
    (tmp_path / "llm.yaml").write_text(TINY)
    out = tmp_path / "out"
    assert (
        main(["train", "llm", "--config", str(tmp_path / "llm.yaml"), "--max_steps", "2", "--output_dir", str(out)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert f"llm: writes to {out}" in lines
    assert "  steps: 2, global batch size 2" in lines
    assert [line[:9] for line in lines if "| loss" in line] == ["step 1/2 ", "step 2/2 "]
    assert (out / "model.safetensors").is_file()
    assert (out / "trainer_state.json").is_file()


@pytest.mark.parametrize("stage", TRAINING_STAGES)
def test_help_of_a_stage(stage, capsys):
    code, out, _ = stopped(capsys, stage, "--help")
    assert code == 0
    assert out.startswith(f"usage: libra train {stage} [--config FILE.yaml] [--OPTION VALUE ...]\n")
    assert "--per_device_train_batch_size" in out


def test_help_of_all_stages(capsys):
    code, out, _ = stopped(capsys, "--help")
    assert code == 0
    assert all(stage in out for stage in TRAINING_STAGES)


def test_a_stage_there_is_not(capsys):
    code, _, err = stopped(capsys, "everything")
    assert code == 2
    assert "'everything' (choose from 'clip', 'llm', 'tokenizer', 'pretrain', 'sft', 'dpo')" in err


def test_wrong_options_are_said_in_a_line(fails, capsys, tmp_path):
    assert "either model, or language_model and image_tokenizer" in fails("pretrain")
    assert "no_such.yaml" in fails("sft", "--config", str(tmp_path / "no_such.yaml"))
    common = ("--output_dir", str(tmp_path), "--use_cpu", "True")
    assert "--colour" in fails("llm", *common, "--colour", "red")
    assert "max_steps is 0" in fails("llm", *common, "--max_steps", "0")
    assert "report_to has everywhere" in fails("llm", *common, "--report_to", "everywhere")
    assert "train_samples must be at least 1" in fails("sft", "--model", "absent", "--train_samples", "0")
    assert "train_samples must be at least 1" in fails("tokenizer", "--clip", "absent", "--train_samples", "-1")
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_the_world_of_clip_needs_a_number_of_steps(fails, tmp_path):
    (tmp_path / "clip.yaml").write_text("vision_config: {image_size: 32}\nuse_cpu: true\n")
    assert "set max_steps" in fails(
        "clip", "--config", str(tmp_path / "clip.yaml"), "--output_dir", str(tmp_path / "o")
    )


def test_wrong_values_are_said_with_the_name_of_the_option(capsys):
    code, _, err = stopped(capsys, "pretrain", "--max_steps", "many")
    assert code == 2
    assert err.splitlines()[1:] == [
        "libra train pretrain: error: argument --max_steps/--max-steps: invalid int value: 'many'"
    ]


def test_missing_packages_are_named(fails, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("trl", "peft") else object())
    line = fails("sft", "--model", "anything")
    assert "not installed: trl, peft. Run: pip install 'libra-vlm[train]'" in line
