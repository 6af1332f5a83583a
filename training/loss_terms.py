"""The terms of a loss in the log of a Trainer, beside their sum."""

from collections.abc import Mapping

import torch
from transformers import Trainer


class LossTermsTrainer(Trainer):
    """
    A Trainer that logs the terms of its loss: the means over the batches of this process since the last log.

    Subclasses call [`~LossTermsTrainer.keep_terms`] in `compute_loss`. Terms of training are logged beside `loss`, those
    of an evaluation beside `eval_loss` and with the same prefix.

    Args:
        args, kwargs: as in transformers' `Trainer`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._terms: dict[bool, dict[str, list[torch.Tensor]]] = {True: {}, False: {}}  # of training, of evaluation

    def keep_terms(self, terms: Mapping[str, torch.Tensor]) -> None:
        """
        Keeps the terms of one batch for the next log.

        Args:
            terms (`dict[str, torch.Tensor]`): scalars by name; a batch may lack some.
        """
        kept = self._terms[self.model.training]
        for name, term in terms.items():
            kept.setdefault(name, []).append(term.detach())  # on the device: reading it would wait for the batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the terms since the last log; what is there already stays."""
        loss = next((key for key in logs if key.endswith("loss") and key != "train_loss"), None)
        if loss is not None:  # "loss", or "eval_loss" with whatever prefix the evaluation has
            kept = self._terms[loss == "loss"]
            for name, values in kept.items():
                mean = torch.stack(values).mean().item()
                logs.setdefault(loss.removesuffix("loss") + name, round(mean, 4))
            kept.clear()
        super().log(logs, start_time)
