"""Kinds of results: the records of each, and the tables that show them. `RESULTS` is the list of all."""

from __future__ import annotations

import json
from pathlib import Path

from harness.json_records import from_json
from harness.results.attention import AttentionResult
from harness.results.base import Result
from harness.results.data import DataResult
from harness.results.device_tests import DeviceTestsResult
from harness.results.dual_question import DualQuestionResult
from harness.results.features import FeaturesResult
from harness.results.gpu import GpuResult
from harness.results.kernel_scores import KernelScoresResult
from harness.results.kill_runs import KillResult
from harness.results.lists import ListsResult
from harness.results.loop import LoopResult
from harness.results.mask_ablation import MaskResult
from harness.results.needs import NeedsResult
from harness.results.operations import OperationsResult
from harness.results.optimizers import OptimizerResult
from harness.results.pack_shards import PackShardsResult
from harness.results.packed import CodecsResult, PackedResult
from harness.results.parts import PartsResult
from harness.results.predict import PredictedKernelsResult, PredictResult
from harness.results.progressive import ProgressiveResult
from harness.results.sanitize import SanitizerResult
from harness.results.scaling import ScalingResult
from harness.results.speedrun import SpeedrunResult
from harness.results.stage2 import Stage2Result
from harness.results.step import ProfileResult
from harness.results.steps import StepsResult
from harness.results.store import FaultsResult, StoreResult
from harness.results.temporal import TemporalResult
from harness.results.training_run import TrainingResult

# By the command that writes it.
RESULTS: dict[str, type[Result]] = {
    "operations": OperationsResult,
    "attention": AttentionResult,
    "dual_vs_encoder": StepsResult,
    "step": ProfileResult,
    "data": DataResult,
    "packed": PackedResult,
    "packed_codecs": CodecsResult,
    "scaling": ScalingResult,
    "predict": PredictResult,
    "predicted_kernels": PredictedKernelsResult,
    "features": FeaturesResult,
    "loop": LoopResult,
    "lists": ListsResult,
    "index_start": ListsResult,
    "pack_shards": PackShardsResult,
    "parts": PartsResult,
    "training_run": TrainingResult,
    "device_tests": DeviceTestsResult,
    "sanitize": SanitizerResult,
    "kernel_scores": KernelScoresResult,
    "gpu": GpuResult,
    "progressive": ProgressiveResult,
    "mask_ablation": MaskResult,
    "dual_question": DualQuestionResult,
    "temporal": TemporalResult,
    "optimizers": OptimizerResult,
    "stage2": Stage2Result,
    "speedrun": SpeedrunResult,
    "kill_runs": KillResult,
    "needs": NeedsResult,
    "store": StoreResult,
    "store_runs": StoreResult,  # `store.py --parts runs`
    "store_faults": FaultsResult,
}
# Other names: of the README's tables, and of a command before it was renamed.
ALIASES = {"steps": "dual_vs_encoder", "masks": "mask_ablation", "kernels": "operations"}


def result_type(name: str) -> type[Result]:
    """Type of a command's results; what follows a dot tells several of one command apart
    ("dual_vs_encoder.vit_g").

    Raises:
        ValueError: an unknown name.
    """
    command = name.partition(".")[0]
    kind = RESULTS.get(ALIASES.get(command, command))
    if kind is None:
        raise ValueError(f"unknown result {name!r}; known: {', '.join([*RESULTS, *ALIASES])}")
    return kind


def read_result(path: str | Path, name: str) -> Result:
    """The result of command `name` in a file.

    Raises:
        ValueError: an unknown name, a missing file, or no such result.
    """
    kind = result_type(name)
    try:
        result = from_json(kind, json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a result of {name}: {error}") from None
    if not result.records:
        raise ValueError(f"{path}: not a result of {name}: it has no records")
    return result
