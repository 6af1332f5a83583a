"""The terms of a loss in the log of a Trainer, beside their sum."""

from collections.abc import Mapping

import torch
from accelerate.utils import gather_object
from transformers import Trainer


class LossTermsTrainer(Trainer):
    """
    A Trainer that logs the terms of its loss: the means over the batches of all processes since the last log.

    Subclasses call [`~LossTermsTrainer.keep_terms`] in `compute_loss`. Terms of training are logged beside `loss`, those
    of an evaluation beside `eval_loss` and with the same prefix.

    Args:
        args, kwargs: as in transformers' `Trainer`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Of training and of evaluation: each term with its weight in the mean.
        self._terms: dict[bool, dict[str, list[tuple[torch.Tensor, torch.Tensor]]]] = {True: {}, False: {}}

    def keep_terms(self, terms: Mapping[str, torch.Tensor], counts: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        Keeps the terms of one batch for the next log.

        Args:
            terms (`dict[str, torch.Tensor]`): scalars by name; a batch may lack some.
            counts (`dict[str, torch.Tensor]`, *optional*):
                Scalars on the device: of how many things a term is the mean, 0 or False if it has nothing to say. By
                default every batch counts alike.
        """
        kept = self._terms[self.model.training]
        for name, term in terms.items():
            count = torch.ones_like(term) if counts is None or name not in counts else counts[name].to(term)
            kept.setdefault(name, []).append((term.detach(), count))  # on the device: reading would wait for the batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the terms since the last log; what is there already stays."""
        loss = next((key for key in logs if key.endswith("loss") and key != "train_loss"), None)
        if loss is not None:  # "loss", or "eval_loss" with whatever prefix the evaluation has
            logs |= {
                name: round(mean, 4)
                for name, mean in self._take_means(loss == "loss", loss.removesuffix("loss")).items()
                if name not in logs
            }
        super().log(logs, start_time)

    def _take_means(self, of_training: bool, prefix: str) -> dict[str, float]:
        """The means of the kept terms over all processes; none are kept after."""
        sums: dict[str, list[float]] = {}
        for name, values in self._terms[of_training].items():
            terms, counts = map(torch.stack, zip(*values))
            sums[name] = [(terms * counts).sum().item(), counts.sum().item()]
        self._terms[of_training].clear()
        total: dict[str, list[float]] = {}
        for part in gather_object([sums]):
            for name, (term, count) in part.items():
                before = total.get(name, [0.0, 0.0])
                total[name] = [before[0] + term, before[1] + count]
        return {prefix + name: term / count for name, (term, count) in total.items() if count}
