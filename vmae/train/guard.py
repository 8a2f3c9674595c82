"""Numbers that the host reads a step late, and a flag on the device that keeps a bad step from the weights
meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


class LateNumbers:
    """A copy of a small tensor on its way to the host; making one waits for nothing."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.device.type != "cuda":
            self._host = values.detach().clone()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> Tensor:
        """The copy, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def read(self) -> list[float]:
        return self.wait().tolist()


def device_is_idle(device: torch.device) -> bool:
    """Whether the device has done all that it was asked for; a CPU always has."""
    return device.type != "cuda" or torch.cuda.current_stream(device).query()


class FiniteGuard:
    """Takes optimizer steps as long as every loss and gradient norm so far was finite.

    The flag lives on the device, and stays up once it is up: until the host, which reads it late, has stopped
    the run, no later step moves the weights or the optimizer's state. Fused optimizers look at it there
    (`found_inf`, which they have for loss scaling); for others the host waits and looks itself, every step.

    Attributes:
        failed: float32 scalar on the device, 1 once something was not finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.failed = torch.zeros((), device=device)
        self.on_device = getattr(optimizer, "_step_supports_amp_scaling", False)

    def step(self, loss: Tensor, norm: Tensor) -> None:
        """One optimizer step, unless this loss or norm, or an earlier one, is not finite."""
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        self.failed = torch.maximum(self.failed, (~finite).float())
        self.take(self.failed)

    def take(self, flag: Tensor) -> None:
        """One optimizer step, unless the flag is up."""
        if self.on_device:
            self.optimizer.found_inf = flag  # type: ignore[attr-defined]  # fused steps read it
            self.optimizer.step()
        elif not flag.item():
            self.optimizer.step()

    def numbers(self, loss: Tensor, norm: Tensor) -> Tensor:
        """What the host reads of the step just done, float32 on the device."""
        return torch.stack([loss, norm.float(), self.failed])
