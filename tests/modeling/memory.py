"""Counts the bytes of live tensors, operation by operation: no timing, no allocator, the same on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """
    Counts the storages that operations return, from when they are made until they are freed, in forward and backward.

    What is there before the meter starts counts nothing, and neither does what a kernel uses inside.

    Attributes:
        live (`int`): bytes alive now.
        peak (`int`): the most there were.
        shapes (`set[torch.Size]`): of every tensor returned.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.shapes: set[torch.Size] = set()
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._count(tensor, 0)  # it was there before, or is counted already
        outputs = function(*args, **(kwargs or {}))
        for tensor in _tensors(outputs):
            self._count(tensor, tensor.untyped_storage().nbytes())
            self.shapes.add(tensor.shape)
        return outputs

    def _count(self, tensor, size):
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, address, size):
        self._known.discard(address)  # another storage may get it
        self.live -= size


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
