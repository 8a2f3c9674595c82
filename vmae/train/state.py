"""What a checkpoint holds of a run, as named tensors: `model` (published names), `optimizer`, companions.

Optimizer state stands under the parameter's name, not its number, and every tensor is whole as a DTensor
where it is sharded. So a checkpoint loads whatever the number of ranks and the kind of parallelism that wrote
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmae.checkpoint.format import (
    Layouts,
    NamedTensors,
    load_tensors,
    read_manifest,
    shapes_of,
    tensor_layouts,
)
from vmae.checkpoint.published import check_shapes
from vmae.errors import InputError


class Companion(Protocol):
    """What a checkpoint can hold beside the model: a module, or whatever has its state as named tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class TrainingState:
    """The tensors of a run that is going on.

    Args:
        model: without DDP's wrapper; sharded or not.
        optimizer: over its parameters, whose state is tensors of the parameter's shape, and scalars.
        companions: what else is saved, by a name other than "model" and "optimizer".
        optional: those of them whose tensors stay as they are where a checkpoint lacks them, or has them in
            other shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        companions: dict[str, Companion],
        optional: Sequence[str] = (),
    ) -> None:
        self.modules: dict[str, Companion] = {"model": model, **companions}
        self.optional = optional
        self.optimizer = optimizer
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.names = {name: p for name, p in model.named_parameters() if id(p) in trained}

    def tensors(self) -> NamedTensors:
        """Group -> name -> tensor; the tensors are the run's own, not copies."""
        state = self.optimizer.state
        moments = {
            f"{name}.{key}": value
            for name, p in self.names.items()
            for key, value in state.get(p, {}).items()
        }
        return {
            **{name: dict(module.state_dict()) for name, module in self.modules.items()},
            "optimizer": moments,
        }

    def load(self, path: Path, group: Any = None) -> dict[str, Any]:
        """Fill all of it from a checkpoint, whose manifest is returned.

        Args:
            group: of ranks that all load together.

        Raises:
            InputError: it lacks tensors, holds others, or some have other shapes; nothing is changed then.
        """
        layouts = tensor_layouts(path)
        for name, module in self.modules.items():
            own = {key: value.shape for key, value in module.state_dict().items()}
            if name not in self.optional:
                check_shapes(own, shapes_of(layouts, name), path)
        self.optimizer.state.update(self._empty_moments(layouts, path))
        wanted = self.tensors()
        for name in self.optional:
            found = shapes_of(layouts, name)
            wanted[name] = {key: one for key, one in wanted[name].items() if found.get(key) == one.shape}
        load_tensors(path, {name: tensors for name, tensors in wanted.items() if tensors}, group)
        return read_manifest(path)

    def _empty_moments(self, layouts: Layouts, path: Path) -> dict[Tensor, dict[str, Tensor]]:
        """Room for the optimizer state that the file has; torch makes it at the first step only."""
        found: dict[Tensor, dict[str, Tensor]] = {}
        for key, (size, dtype) in layouts.items():
            if key.startswith("optimizer."):
                name, _, moment = key.removeprefix("optimizer.").rpartition(".")
                if name not in self.names:
                    raise InputError(
                        f"checkpoint {path} holds optimizer state of {name}, which is not trained here"
                    )
                found.setdefault(self.names[name], {})[moment] = self._empty(self.names[name], size, dtype)
        return found

    def _empty(self, parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
        if size == parameter.shape:
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        # A scalar: the count of steps, which fused optimizers want beside the parameter.
        beside = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        return torch.zeros(size, dtype=dtype, device=parameter.device if beside else "cpu")
