"""Several processes, with DDP and with FSDP2 over gloo, give the losses and the weights of one."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

from libra_cli.init import init_repo
from libra_cli.loading import load_libra
from modeling_libra import LibraConfig, LibraForCausalLM
from tests.conftest import REPOSITORY
from tests.parts import TOKENIZER_FIELDS, make_clip, make_llm
from tests.training.caption_files import write_shards
from training import pretrain, sft
from training.memory import count_weights, held_by_device
from training.run import check_engine

CONFIGS = REPOSITORY / "training" / "configs" / "accelerate"
COMMON = {
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",  # else the schedule would depend on max_steps
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
TALKS = [  # steps of two samples: images in both, in one, in none
    ("red", "What colour?", "red"),
    ("green", "What colour is it?", "green"),
    ("blue", "What colour?", "blue"),
    (None, "Hello?", "Hello!"),
    (None, "How are you?", "Very well."),
    (None, "1 + 1?", "2"),
]


@pytest.fixture(scope="module")
def start(golden, tmp_path_factory):
    """A fresh Libra."""
    folder = tmp_path_factory.mktemp("start")
    llm = make_llm(folder / "llm", "llama", golden)
    return init_repo(llm, make_clip(folder / "clip"), folder / "libra", **TOKENIZER_FIELDS)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), shards=2, rows=6)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    samples = []
    for number, (colour, question, answer) in enumerate(TALKS):
        sample = {"id": str(number)}
        if colour is not None:
            Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
            sample["image"], question = f"{colour}.png", f"<image>\n{question}"
        sample["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        samples.append(sample)
    (folder / "talks.json").write_text(json.dumps(samples))
    return folder / "talks.json"


def stage_flags(stage, start, data, out, **options) -> list[str]:
    """One process reads two streams in turn, a batch of each a step; two processes one each: the same samples."""
    own = {
        "pretrain": {"per_device_train_batch_size": 2, "shuffle_buffer": 0},
        "sft": {"per_device_train_batch_size": 1, "shuffle_dataset": False, "train_sampling_strategy": "sequential"},
    }[stage]
    options = {"model": start, "dataset": data, "output_dir": out, **COMMON, **own, **options}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def rehearsing(captions, batch_size) -> dict:
    """So many samples of pretraining for each process, of both layouts; without noise, which is each process's own."""
    options = {"weight": 0.5, "dataset": captions, "batch_size": batch_size, "noise": 0}
    return {f"rehearsal_{name}": value for name, value in options.items()}


def beside(captions, processes) -> dict:
    """Conversations about the world, and beside them samples of pretraining and choices in two forms."""
    world = {
        "dataset": "world",
        "icons": REPOSITORY / "tests" / "data" / "icons",
        "num_concepts": 8,
        "train_samples": 12,
        "eval_samples": 2,
    }
    unspoken = {"weight": 2.0, "batch_size": 2 // processes, "layers": 1}
    own = {f"unspoken_{name}": value for name, value in unspoken.items()}
    return {**world, **rehearsing(captions, 8 // processes), **own}


def launch(engine, jobs, folder) -> str:
    """Runs stages with two processes, as `accelerate launch` does with the shipped configuration."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
    module = ["-m", "tests.training.run_stages", engine, str(folder / "jobs.json")]
    run = subprocess.run([*command, *options, *module], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def one(start, captions, talks, tmp_path_factory):
    """Runs of one process. In pretraining it accumulates the two batches of a step; in tuning it has the whole batch."""
    folder = tmp_path_factory.mktemp("one")
    accumulate = {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}
    pretrain.main(stage_flags("pretrain", start, captions, folder / "pretrain", **accumulate))
    whole = {"per_device_train_batch_size": 2, "gradient_checkpointing": False}
    sft.main(stage_flags("sft", start, talks, folder / "sft", **whole))
    sft.main(stage_flags("sft", start, talks, folder / "beside", **whole, **beside(captions, 1)))
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, start, captions, talks, tmp_path_factory):
    """Runs of two processes, with activation checkpointing, in a folder of the engine's name."""
    folder = tmp_path_factory.mktemp("two") / request.param
    folder.mkdir()
    save = {"gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 2}
    more = {"gradient_checkpointing": True, **beside(captions, 2)}
    sharded = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    jobs = [
        ("pretrain", stage_flags("pretrain", start, captions, folder / "pretrain", **save), {}),
        ("sft", stage_flags("sft", start, talks, folder / "sft", gradient_checkpointing=True), {}),
        ("sft", stage_flags("sft", start, talks, folder / "beside", **more), {}),
    ] + [
        ("pretrain", stage_flags("pretrain", start, captions, folder / "parts", max_steps=steps, **save), sharded)
        for steps in (2, 3)
    ]
    (folder / "output.txt").write_text(launch(request.param, jobs, folder))
    return folder


def logged(folder, *names) -> torch.Tensor:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([[log[name] for name in names] for log in history if "loss" in log])


def assert_same_run(found, expected, *names):
    """Sums are taken in another order, so not bit for bit."""
    torch.testing.assert_close(logged(found, *names), logged(expected, *names), rtol=1e-5, atol=1e-6)
    weights, other = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert weights.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-6, msg=name)


def test_pretraining(one, two, start):
    """Of a stream."""
    assert "frozen parameters are bit for bit as before training" in (two / "output.txt").read_text()
    names = ("loss", "text_loss", "vision_loss", "codebook_1_loss", "codebook_2_loss", "grad_norm")
    assert_same_run(two / "pretrain", one / "pretrain", *names)
    before, after = load_file(start / "model.safetensors"), load_file(two / "pretrain" / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(after[name], value) == ("vision" not in name), name


def test_instruction_tuning(one, two):
    """A step in which both processes have images, one in which one has text alone, and one in which both do."""
    assert_same_run(two / "sft", one / "sft", "loss", "grad_norm")


def test_samples_beside_conversations(one, two):
    rehearsed, unspoken = ("rehearsal_text_loss", "rehearsal_vision_loss"), ("unspoken_loss", "unspoken_distance")
    assert_same_run(two / "beside", one / "beside", "loss", *rehearsed, *unspoken, "grad_norm")


def test_a_checkpoint_of_two_processes_is_a_whole_model_for_one(two):
    folder = two / "pretrain" / "checkpoint-2"
    assert (folder / "pytorch_model_fsdp.bin").exists() == (two.name == "fsdp2")
    model, report = LibraForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    last = LibraForCausalLM.from_pretrained(two / "pretrain").state_dict()
    for name, value in model.state_dict().items():  # a step away from the end
        torch.testing.assert_close(value, last[name], rtol=0, atol=2e-3, msg=name)


def test_two_processes_go_on_where_they_stopped(two):
    """Bit for bit; with FSDP2 from a sharded checkpoint, and the result is a whole model all the same."""
    sharded = (two / "parts" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    assert sharded == (two.name == "fsdp2")
    weights = [load_file(two / name / "model.safetensors") for name in ("pretrain", "parts")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    assert torch.equal(logged(two / "parts", "loss"), logged(two / "pretrain", "loss"))


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_processes_hold_what_is_counted(two, start, stage):
    """Parameters, gradients and moments of live processes; all float32 here, the frozen ones too."""
    weights = [weight._replace(stored=4) for weight in count_weights(LibraConfig.from_pretrained(start), stage)]
    counted = held_by_device(weights, {"ddp": "DDP", "fsdp2": "FSDP2"}[two.name], 2)
    held = [json.loads((two / stage / f"held-{process}.json").read_text()) for process in range(2)]
    for name in ("weights", "gradients", "moments"):
        # The vision heads and the image rows of the last layer have no gradient in tuning: no answer is an image.
        most = max(process[name] for process in held)
        assert (
            most == getattr(counted, name)
            if stage == "pretrain" or name == "weights"
            else most < getattr(counted, name)
        )
    if two.name == "fsdp2":
        assert held[0]["weights"] < 0.6 * sum(4 * weight.numbers for weight in weights)


def test_what_is_trained_is_float32(start, captions, tmp_path):
    """Of a model stored in 16 bits; the frozen language model stays as it is stored."""
    model, processor = load_libra(start)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    options = {"max_steps": 1, "bf16": True}
    pretrain.main(stage_flags("pretrain", tmp_path / "half", captions, tmp_path / "out", **options))
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert value.dtype == (torch.float32 if "vision" in name else torch.bfloat16), name


def launcher_arguments(name, *flags) -> argparse.Namespace:
    """What accelerate makes of a shipped configuration."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), *flags, "-m", "training.pretrain"])
    return _validate_launch_command(args)[0]


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("one_gpu", "NO", 1),
        ("ddp", "MULTI_GPU", 8),
        ("fsdp2", "FSDP", 8),
        ("deepspeed_zero2", "DEEPSPEED", 8),
        ("deepspeed_zero3", "DEEPSPEED", 8),
        ("multi_node", "FSDP", 64),
    ],
)  # fmt: skip
def test_accelerate_reads_the_configurations(name, kind, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, processes, "bf16")
    assert f"--config_file training/configs/accelerate/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()
    args = launcher_arguments(name, "--main_process_port", "0")
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # as launch_command does
    prepare = {"NO": prepare_simple_launcher_cmd_env, "DEEPSPEED": prepare_deepspeed_cmd_env}
    prepared = prepare.get(kind, prepare_multi_gpu_env)(args)
    env = prepared if isinstance(prepared, dict) else prepared[1]
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if kind == "FSDP":
        assert env["FSDP_VERSION"] == "2"
        assert env["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in env  # the model names its layers
    if kind == "DEEPSPEED":
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[-1]
        assert env["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
        assert env.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false") == "false"
        assert env.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL") == ("true" if name[-1] == "3" else None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "image tokenizer without weights"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "checkpoint each layer twice"),
        ({"FSDP_VERSION": "1"}, "fsdp_version is 1; set 2"),
    ],
)
def test_settings_that_would_do_something_else_are_refused(tmp_path, monkeypatch, setting, message):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | setting).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_engine(args)


def test_fsdp_on_cpus_is_refused(tmp_path, monkeypatch):
    """accelerate would run DDP without a word."""
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(args.distributed_state, "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(ValueError, match="FSDP needs accelerators"):
        check_engine(args)
