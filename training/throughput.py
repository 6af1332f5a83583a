"""How much a run gets through and what it takes: tokens per second and peak memory."""

import resource
import sys
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator


class Throughput:
    """
    Tokens per second since it was last read, over all processes. Pauses for evaluations and checkpoints count.

    Args:
        accelerator (`Accelerator`): adds up the processes.
        clock (`Callable`, *optional*, defaults to `time.monotonic`): gives seconds.
    """

    def __init__(self, accelerator: Accelerator, clock: Callable[[], float] = time.monotonic) -> None:
        self._accelerator = accelerator
        self._clock = clock
        self._tokens = torch.zeros((), dtype=torch.long, device=accelerator.device)
        self._start: float | None = None

    def count(self, attention_mask: torch.Tensor) -> None:
        """
        Counts a batch; the first one starts the clock.

        Args:
            attention_mask (`torch.Tensor` of shape `(batch, length)`): 0 on padding, which does not count.
        """
        if self._start is None:
            self._start = self._clock()
        self._tokens += attention_mask.count_nonzero()  # on the device: reading it would wait for the batch

    def read(self) -> dict[str, float]:
        """
        To be called by all processes.

        Returns:
            `dict` with `tokens_per_second` of all processes together, and `peak_memory_gb` of this one (see
            [`peak_memory`]), in units of 2^30 bytes; the former is missing when nothing was counted.
        """
        measured = {"peak_memory_gb": round(peak_memory() / 2**30, 3)}
        if self._start is not None:
            now = self._clock()
            tokens = self._accelerator.reduce(self._tokens, "sum").item()
            measured["tokens_per_second"] = round(tokens / (now - self._start), 1)
            self._start = now
        self._tokens = torch.zeros_like(self._tokens)
        return measured


def peak_memory() -> int:
    """
    The most memory this process has had so far.

    Returns:
        `int`: bytes: allocated by torch on the GPU if there is one, else resident in main memory.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
