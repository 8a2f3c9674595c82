"""Notes what a step does, call by call, on tensors that hold nothing: what PyTorch runs and moves, which of
this package's operators are called, which kernels are launched; and what a compiler would leave of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def storage_of(tensor: Tensor) -> int:
    """A storage's identity, of meta tensors too (as long as it lives)."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True, kw_only=True)
class TorchCall:
    """What PyTorch does by itself: a product of cuBLAS, attention, or a pass over memory.

    Attributes:
        read, made: bytes by storage.
        flops, shape: of a product (rows, columns, terms of a sum) or of attention (clips, heads, queries,
            head dim, keys).
        reduces: a value of the result needs many of the input.
    """

    name: str
    read: dict[int, float]
    made: dict[int, float]
    flops: float = 0.0
    shape: tuple[int, ...] = ()
    reduces: bool = False

    @property
    def bytes(self) -> float:
        return sum(self.read.values()) + sum(self.made.values())


@dataclass(frozen=True, kw_only=True)
class OperatorCall:
    """A call of one of this package's operators ("embed_visible_backward"), and the elements and bytes of its
    tensor arguments and results."""

    name: str
    elements: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a step did: a launch, a TorchCall or an OperatorCall; `operator` is the one it was within."""

    direction: str
    what: Any
    operator: str | None = None


_REDUCTIONS = ("sum", "mean", "var_mean", "native_layer_norm", "native_layer_norm_backward", "max", "min")
_MAKERS = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided")


class Recorder(TorchDispatchMode):
    """Notes what runs, in order, in `events`.

    Args:
        enter: note what the operators of this package do within; else they are one event each.
        compute: do products; else their results hold anything.
    """

    def __init__(self, enter: bool, compute: bool = True) -> None:
        super().__init__()
        self.enter, self.compute = enter, compute
        self.direction = "forward"
        self.operator: str | None = None
        self.events: list[Event] = []
        self.outer: set[int] = set()  # storages of arguments, results and their gradients
        self._kept: list[Any] = []  # a storage that lives keeps its identity

    def append(self, what: Any) -> None:
        self.events.append(Event(direction=self.direction, what=what, operator=self.operator))

    def given(self, *tensors: Tensor) -> None:
        """Notes tensors that come from outside or stay when all is done."""
        self._kept += tensors
        self.outer |= {storage_of(x) for x in tensors}

    def counts(self, tensors: list[Tensor]) -> bool:
        """Whether a call on these is part of the step."""
        return bool(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "vmae":
            return self._operator(func, name, args, kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not self.compute and name in _PRODUCTS:
            result = kwargs.get("out")
            if result is None:
                left, right = args[-2:]
                result = left.new_empty((*left.shape[:-1], right.shape[-1]))
        else:
            result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        own = {storage_of(x) for x in given}
        if self.counts(given + made) and (
            func._schema.is_mutable or any(storage_of(x) not in own for x in made)
        ):
            self._kept += [*given, *made]
            if name not in _MAKERS:
                self.append(torch_call(func, name, args, kwargs, result))
        return result

    def _operator(self, func, name: str, args: tuple, kwargs: dict):
        outside, self.operator = self.operator, name
        at = len(self.events)
        if self.enter:
            with self:  # The function behind the operator: the dispatcher would hide what it calls.
                result = torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self.operator = outside
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self._kept += tensors
        size = sum(x.numel() * x.element_size() for x in tensors)
        call = OperatorCall(name=name, elements=sum(x.numel() for x in tensors), bytes=size)
        self.events.insert(at, Event(direction=self.direction, what=call, operator=name))
        return result


_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def torch_call(func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> TorchCall:
    """One call of PyTorch: bytes, and FLOPs of products."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    written = {storage_of(x): float(x.numel() * x.element_size()) for x in made}
    read = {storage_of(x): float(x.numel() * x.element_size()) for x in given if storage_of(x) not in written}
    flops = 0.0
    shape: tuple[int, ...] = ()
    if name in _PRODUCTS:
        left, right = [x for x in args if isinstance(x, Tensor)][-2:]
        shape = (left.numel() // left.shape[-1], right.shape[-1], left.shape[-1])
        flops = 2.0 * math.prod(shape)
    elif func.overloadpacket in flop_registry:
        flops = float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result))
    elif "dot_product" in name:
        query, key = given[1:3] if "backward" in name else given[:2]
        shape = (*query.shape, key.shape[2])
        # Two products of queries x keys x head dim forward, five backward.
        flops = (5 if "backward" in name else 2) * 2.0 * math.prod(shape)
    if name == "index":  # Reads what it gathers, no more.
        source, count = given[0], sum(x.numel() for x in made)
        read[storage_of(source)] = float(min(source.numel(), count) * source.element_size())
    return TorchCall(
        name=name, read=read, made=written, flops=flops, shape=shape, reduces=name in _REDUCTIONS
    )


def joined_products(events: list[Event]) -> list[Event]:
    """Without the copy of a product into float32 that an operator makes on a CPU, where cuBLAS writes float32
    itself."""
    found: list[Event] = []
    for event in events:
        before, call = found[-1].what if found else None, event.what
        is_copy = isinstance(call, TorchCall) and call.name == "copy_" and event.operator is not None
        if (
            is_copy
            and isinstance(before, TorchCall)
            and before.flops
            and call.read.keys() == before.made.keys()
        ):
            found[-1] = replace(found[-1], what=replace(before, made=call.made))
        else:
            found.append(event)
    return found


def fused(events: list[Event], outer: set[int]) -> list[tuple[str, TorchCall, int]]:
    """PyTorch's calls as a compiler would leave them: direction, call, passes over its inputs.

    Stated formula: every product, attention and operator is a call of its own; the calls between two of them
    are one kernel that reads what came from outside and writes what is used later (or is in `outer`). It
    passes over its inputs once more for each reduction at worst.
    """
    groups: list[tuple[str, list[TorchCall]]] = []
    apart = True
    for event in events:
        call = event.what
        if isinstance(call, OperatorCall) or not isinstance(call, TorchCall):
            apart = True
            continue
        if apart or call.flops or groups[-1][1][-1].flops or groups[-1][0] != event.direction:
            groups.append((event.direction, []))
        groups[-1][1].append(call)
        apart = False
    last_use: dict[int, int] = {}
    for i, (_, calls) in enumerate(groups):
        for call in calls:
            last_use |= dict.fromkeys(call.read, i)
    found = []
    for i, (direction, calls) in enumerate(groups):
        made: dict[int, float] = {}
        read: dict[int, float] = {}
        for call in calls:
            for key, size in call.read.items():
                if key not in made:
                    read[key] = max(read.get(key, 0.0), size)
            made |= call.made
        wrote = {key: size for key, size in made.items() if key in outer or last_use.get(key, -1) > i}
        first = calls[0]
        name = first.name if len(calls) == 1 else "fused"
        flops = sum(call.flops for call in calls)
        call = TorchCall(name=name, read=read, made=wrote, flops=flops, shape=first.shape)
        found.append((direction, call, 1 + sum(call.reduces for call in calls)))
    return found
