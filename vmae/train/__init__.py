"""Training: one loop for all tasks, its optimizer, checkpoints and logs.

The package can be called: `vmae.train(config, output="runs/a")` is `vmae.train.run.train`.
"""

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        from vmae.train.run import train

        return train(*args, **settings)


sys.modules[__name__].__class__ = _CallablePackage
