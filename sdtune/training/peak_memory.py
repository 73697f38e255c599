"""Counts the bytes of tensors from the moment each is made to the moment it is freed."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemoryMode(TorchDispatchMode):
    """Counts the bytes of the storages in use, by kind; ``worst`` holds the counts when there were most.

    Args:
        known: tensors that exist before and after, and are not counted.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.kind = "activations"
        self.now: Counter[str] = Counter()
        self.worst: Counter[str] = Counter()
        self.held: dict[int, tuple[str, int]] = {}
        for tensor in known:
            self.track(tensor, "known")
        self.now.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.track(tensor, self.kind)
        if self.now.total() > self.worst.total():
            self.worst = self.now.copy()
        return out

    def track(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = kind, storage.nbytes()
            self.now[kind] += storage.nbytes()
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        kind, size = self.held.pop(key)
        if kind != "known":
            self.now[kind] -= size

    def mark_gradient(self, parameter: Tensor) -> None:
        """From now on count the gradient of ``parameter`` as a gradient; when it was made it was of another kind."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        kind, size = self.held[key]
        self.held[key] = "gradients", size
        self.now[kind] -= size
        self.now["gradients"] += size
