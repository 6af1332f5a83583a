"""Counts the bytes of live tensors: an exact account of what code holds, the same on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """
    Counts the bytes of tensors made within the context and not freed since; what was there before is not counted.

    Views share the storage of their base and count once. Work space inside a kernel is not seen.

    Attributes:
        live (`int`): Bytes that are alive now.
        peak (`int`): Most bytes that were alive at a time.

    Example:

    ```python
    >>> with LiveMemory() as memory:
    ...     pixels = image_tokenizer.decode(codes)
    >>> memory.peak
    ```"""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):  # of unknown origin: not made here
            self._add(tensor, counted=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor, counted=True)
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, tensor: torch.Tensor, counted: bool):
        # A storage keeps its Python object, and so its id, as long as it lives.
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._storages:
            size = storage.nbytes() if counted else 0
            self.live += size
            self._storages[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int):
        del self._storages[key]
        self.live -= size


def _tensors(tree):
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
