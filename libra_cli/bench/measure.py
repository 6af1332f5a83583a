"""Measuring: two workloads timed in turn, the bytes a cache holds, and how measurements become one ratio."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

WARM_UP_PAIRS = 2


@dataclass(frozen=True)
class Workload:
    """
    Something to time.

    Args:
        run (`Callable`): what is timed. Its result lives until the clock has stopped.
        reset (`Callable`, *optional*): makes it ready to run again, off the clock.
    """

    run: Callable[[], Any]
    reset: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Run:
    """
    Measurements of both sides, taken in turn.

    Args:
        ours, baseline (`tuple` of `float`): seconds or bytes, one number a pair.
    """

    ours: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """`float`: median of ours over median of the baseline."""
        return median(self.ours) / median(self.baseline)


def better_run(runs: Sequence[Run]) -> Run:
    """The run with the smallest ratio: a busy machine can make either side slower, at any time."""
    return min(runs, key=lambda run: run.ratio)


def time_pairs(ours: Workload, baseline: Workload, pairs: int) -> Run:
    """
    Times two workloads in turn (ours, baseline, ours, baseline, ...), after a warm-up that is not counted.

    Python's garbage collector runs between pairs and never on the clock.

    Args:
        ours, baseline ([`Workload`]): what to time.
        pairs (`int`): timings of each.

    Returns:
        [`Run`] in seconds.
    """
    for _ in range(WARM_UP_PAIRS):
        _time(ours), _time(baseline)
    was_enabled = gc.isenabled()
    gc.disable()
    times = []
    try:
        for _ in range(pairs):
            gc.collect()
            times.append((_time(ours), _time(baseline)))
    finally:
        if was_enabled:
            gc.enable()
    return Run(*zip(*times))


def _time(workload: Workload) -> float:
    start = time.perf_counter()
    result = workload.run()
    seconds = time.perf_counter() - start
    del result
    if workload.reset is not None:
        workload.reset()
    return seconds


def cache_bytes(cache: Any) -> int:
    """
    The memory a cache holds on to: each storage behind any of its tensors once, in full (a view keeps all of it).

    Args:
        cache: a `Cache` of transformers, or any nest of objects, lists, tuples and dicts with tensors in it.

    Returns:
        `int`: bytes.
    """
    storages = {}
    for tensor in _tensors_in(cache, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors_in(holder: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(holder) in seen or isinstance(holder, (nn.Module, type)):
        return
    seen.add(id(holder))
    if isinstance(holder, torch.Tensor):
        yield holder
        return
    if isinstance(holder, dict):
        parts = list(holder.values())
    elif isinstance(holder, (list, tuple)):
        parts = list(holder)
    else:
        parts = list(getattr(holder, "__dict__", {}).values())
    for part in parts:
        yield from _tensors_in(part, seen)
