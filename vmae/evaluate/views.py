"""Class probabilities of a video, from several views of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vmae.errors import InputError
from vmae.model import Classifier

NO_NUMBERS = (
    "the weights are damaged, or the dtype is too narrow for them: check the run's loss, try --dtype float32"
)


@torch.no_grad()
def view_probabilities(
    model: Classifier, views: Tensor, *, device: torch.device, dtype: str, multi_label: bool, batch_size: int
) -> Tensor:
    """float64 [K], on the CPU: the softmax (or, for several labels, the sigmoid) of each view's logits,
    averaged.

    Args:
        views: uint8 [V, T, H, W, 3].
        batch_size: views at once.

    Raises:
        InputError: a probability is NaN.
    """
    total = torch.zeros(model.num_classes, dtype=torch.float64)
    for part in views.split(batch_size):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(part.to(device, non_blocking=True)).float()
        probabilities = logits.sigmoid() if multi_label else logits.softmax(1)
        total += probabilities.double().sum(0).cpu()
    if total.isnan().any():
        raise InputError(f"the model's output is no number (NaN); {NO_NUMBERS}")
    return total / len(views)


def named(numbers: Sequence[int], class_names: Sequence[str] | None) -> list[str]:
    """Names of classes, their numbers where they have none."""
    return [class_names[number] if class_names else str(number) for number in numbers]
