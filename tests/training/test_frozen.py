"""What is frozen stays bit for bit, and a run that breaks this is stopped before it is saved."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from training.frozen import FrozenParametersCheck, parameter_checksums


class TwoLines(nn.Module):
    """A trained and a frozen slope."""

    def __init__(self):
        super().__init__()
        self.vision_slope = nn.Parameter(torch.zeros(1))
        self.slope = nn.Parameter(torch.ones(1, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x, labels):
        return {"loss": (self.vision_slope * x + self.slope.float() - labels).square().mean()}


class Tamper(TrainerCallback):
    """Changes the frozen slope by one bit in the middle of training."""

    def on_step_end(self, args, state, control, model, **kwargs):
        model.slope.data.view(torch.int16).bitwise_xor_(1)


def make_trainer(folder, *callbacks, **options):
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, **{"max_steps": 1, "save_strategy": "no", **options}
    )
    data = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 8
    return Trainer(TwoLines(), args, train_dataset=data, callbacks=[FrozenParametersCheck, *callbacks])


def test_a_run_that_leaves_them_alone(tmp_path, capsys):
    make_trainer(tmp_path).train()
    assert "The 1 frozen parameters are bit for bit as before training." in capsys.readouterr().out


def test_one_bit_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 1 frozen parameters changed in training, the first is slope"):
        make_trainer(tmp_path, Tamper).train()


@pytest.mark.parametrize("change", [0, 1])
def test_a_checkpoint_with_other_weights_is_refused(tmp_path, change):
    make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(path)
    weights["slope"].view(torch.int16).bitwise_xor_(change)
    save_file(weights, path, metadata={"format": "pt"})
    trainer = make_trainer(tmp_path, max_steps=2)
    if change:
        with pytest.raises(RuntimeError, match="checkpoint of step 1 are not those the run began with"):
            trainer.train(resume_from_checkpoint=str(path.parent))
    else:
        trainer.train(resume_from_checkpoint=str(path.parent))


def test_checksums_are_of_frozen_parameters_and_their_bytes():
    model = TwoLines()
    first = parameter_checksums(model)
    assert first.keys() == {"slope"}
    model.vision_slope.data.add_(1)
    assert parameter_checksums(model) == first
    model.slope.data.neg_()
    assert parameter_checksums(model) != first
