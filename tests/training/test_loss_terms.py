"""Means of loss terms in the log: of the batches since the last log, training and evaluation apart."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from training.loss_terms import LossTermsTrainer

TRAINED, EVALUATED = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [10.0, 30.0]  # a batch each


class Scaled(nn.Module):
    """Its loss is its weight times the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.mean()


class TermTrainer(LossTermsTrainer):
    """Logs the value of a batch, and `seldom` of those above 4."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, value = model(**inputs), inputs["x"].mean()
        self.keep_terms({"value": value, "seldom": value} if value > 4 else {"value": value})
        return (loss, {"loss": loss, "x": inputs["x"]}) if return_outputs else loss


@pytest.fixture
def trainer(tmp_path):
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, per_device_eval_batch_size=1, num_train_epochs=1,
        logging_steps=2, eval_strategy="steps", eval_steps=3, train_sampling_strategy="sequential",
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, label_names=["x"],
    )  # fmt: skip
    sets = [[{"x": torch.tensor(value)} for value in values] for values in (TRAINED, EVALUATED)]
    return TermTrainer(
        Scaled(), args, train_dataset=sets[0], eval_dataset=sets[1],
        compute_metrics=lambda prediction: {"seldom": float(prediction.predictions.max())},
    )  # fmt: skip


def test_means_since_the_last_log(trainer):
    """The evaluation after step 3 takes nothing from the training steps 3 and 4, and gives them nothing."""
    trainer.train()
    found = [(log["step"], log["value"], log.get("seldom")) for log in trainer.state.log_history if "value" in log]
    assert found == [(2, 1.5, None), (4, 3.5, None), (6, 5.5, 5.5)]


def test_means_of_an_evaluation(trainer):
    """With its prefix, and beside what `compute_metrics` says of the whole set."""
    trainer.train()
    found = [log for log in trainer.state.log_history if "eval_value" in log]
    assert [(log["step"], log["eval_value"], log["eval_seldom"]) for log in found] == [(3, 20, 30), (6, 20, 30)]
    metrics = trainer.evaluate(trainer.eval_dataset[:1], metric_key_prefix="test")
    assert (metrics["test_value"], metrics["test_seldom"]) == (10, 10)


def test_the_summary_of_a_run_has_no_terms(trainer):
    trainer.train()
    summary = trainer.state.log_history[-1]
    assert "train_loss" in summary
    assert not {"value", "train_value"} & summary.keys()


def test_batches_that_a_term_does_not_count_for(trainer):
    """Their values leave its mean alone; a term that counted for none is not logged."""
    yes, no = torch.tensor(True), torch.tensor(False)
    trainer.model.train()
    for value, count in ((1.0, yes), (100.0, no), (3.0, yes)):
        terms = {name: torch.tensor(value) for name in ("value", "often", "never")}
        trainer.keep_terms(terms, {"often": count, "never": no})
    logs = {"loss": 1.0}
    trainer.log(logs)
    assert (logs["value"], logs["often"]) == (pytest.approx(104 / 3, abs=1e-4), 2)
    assert "never" not in logs
