"""The tasks: one module for each command that trains, with its `Task`, `add_arguments` and `run`.

A task of your own needs no entry here: hand it to `vmae.train` (docs/training_from_python.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmae.train.task import Task, TaskConfig

# command: (module, class of its task, class of its settings)
TASKS = {
    "pretrain": ("vmae.train.tasks.pretrain", "PretrainTask", "PretrainConfig"),
    "finetune": ("vmae.train.tasks.finetune", "FinetuneTask", "FinetuneConfig"),
    "finetune-detection": ("vmae.train.tasks.detection", "DetectionTask", "DetectionConfig"),
    "distil": ("vmae.train.tasks.distil", "DistilTask", "DistilConfig"),
}


def task_of(config: TaskConfig) -> Task:
    """The task that trains with these settings.

    Raises:
        TypeError: they are of no task of `TASKS`.
    """
    for module, task, settings in TASKS.values():
        if type(config).__name__ == settings:
            found = importlib.import_module(module)
            if type(config) is getattr(found, settings):
                return getattr(found, task)(config)
    known = ", ".join(settings for _, _, settings in TASKS.values())
    raise TypeError(
        f"{type(config).__name__} is of no task here ({known}); hand in the task itself: MyTask(config)"
    )
