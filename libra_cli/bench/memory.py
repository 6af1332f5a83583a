"""Peak memory of a prefill, in a process of its own.

Two accounts, both of what a forward adds to weights and inputs, at its highest:

- *tensors*: bytes of all live tensors, after every operation. The same on every machine and in every run, so this is
  the figure. It does not see what a kernel uses inside.
- *resident*: the system's count of resident pages, where it can be asked (Linux). It sees everything, and is shown
  beside the first. By default glibc keeps freed blocks of up to 32 MiB, more or fewer from run to run; the processes
  run with a fixed threshold, above which a freed block goes back to the system at once.
"""

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .models import build_libra, build_llama, build_prompt, libra_config, split_evenly
from .settings import BenchSettings

_PROCESS = Path("/proc/self")
_GLIBC_THRESHOLD = ("MALLOC_MMAP_THRESHOLD_", str(2**20))


class PeakMemory(NamedTuple):
    """
    What a forward adds to weights and inputs, at its highest.

    Args:
        tensors (`int`): bytes of live tensors.
        resident (`int` or `None`): bytes of resident pages; None where the system does not say.
    """

    tensors: int
    resident: int | None


class LiveTensors(TorchDispatchMode):
    """
    Counts the bytes of all tensors made inside the context that are still alive; `peak` is the most there were.

    Tensors that were there before, and views of them, do not count.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live: dict[StorageWeakRef, int] = {}
        self._older: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in self._live:
                self._older.add(storage)
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in self._older:
                self._live[storage] = tensor.untyped_storage().nbytes()
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._live.values()))
        return output


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def measure_prefill_memory(settings: BenchSettings) -> tuple[PeakMemory, PeakMemory]:
    """
    Peak memory of a prefill with several images, each model in a fresh process.

    Args:
        settings ([`BenchSettings`]): `shape`, `memory_tokens` and `memory_images` count here.

    Returns:
        `tuple` of two [`PeakMemory`]: Libra, the bare language model on as many text tokens.
    """
    ours, bare = (_in_fresh_process(settings, is_libra) for is_libra in (True, False))
    return ours, bare


def _in_fresh_process(settings, is_libra):
    with _environment(*_GLIBC_THRESHOLD), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(prefill_memory, settings, is_libra).result()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for processes started inside."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@torch.no_grad()
def prefill_memory(settings: BenchSettings, is_libra: bool) -> PeakMemory:
    """
    Peak memory of one model's prefill in this process; meaningful in a fresh one.

    Args:
        settings ([`BenchSettings`]): `shape`, `memory_tokens` and `memory_images` count here.
        is_libra (`bool`): whether to measure Libra, and not the bare language model.

    Returns:
        [`PeakMemory`]
    """
    torch.set_num_threads(settings.threads)
    model = (build_libra if is_libra else build_llama)(settings, settings.shape)
    config = libra_config(settings, settings.shape)
    text_tokens = settings.memory_tokens - settings.memory_images * settings.image_tokens
    lengths = split_evenly(text_tokens, settings.memory_images + 1) if is_libra else [settings.memory_tokens]
    prompt = build_prompt(config, lengths, settings.seed)
    inputs: dict[str, Any] = {"input_ids": prompt.input_ids, "use_cache": True, "logits_to_keep": 1}
    if prompt.image_features is not None:
        inputs["image_features"] = prompt.image_features

    model(
        input_ids=build_prompt(config, [8], settings.seed).input_ids, use_cache=True
    )  # threads and kernels are set up before anything is counted
    resident = _resident_growth(lambda: model(**inputs))
    with LiveTensors() as live:
        model(**inputs)
    return PeakMemory(live.peak, resident)


def _resident_growth(run) -> int | None:
    """Bytes the resident set grows by, at its highest, while `run` runs."""
    if not (_PROCESS / "clear_refs").exists():
        return None
    gc.collect()
    (_PROCESS / "clear_refs").write_text("5")  # the high-water mark starts again from what is resident now
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(kilobytes) * 1024
