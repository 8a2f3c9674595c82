"""The stages of the GPU day: commands, their time, and what they need. `STAGES` is the list.

A command's result is FOLDER/NAME.json; what stands before a dot in NAME is its kind (`harness.results`). Each
command has words for the day and words for a rehearsal, in which everything is tiny.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT

STAGE_S = 480.0
BENCH = ROOT / "bench"
IMPORTED = (str(ROOT / "kernels"), str(ROOT))
# Tiny runs of commands that find a GPU otherwise.
TINY = ["--model", "vit_tiny", "--batch", "1", "--device", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Day:
    """Where the results go, and what is here.

    Attributes:
        device_name: of the first GPU.
        gpus: how many; 2 in a rehearsal, so that no command is left out.
    """

    folder: Path
    rehearsed: bool
    device_name: str
    gpus: int

    @property
    def patience(self) -> float:
        """By which limits are multiplied: a rehearsal may run beside much else."""
        return 5.0 if self.rehearsed else 1.0

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a stage.

    Attributes:
        name: of its result and its log.
        limit_s: seconds that it may take.
        words: script and arguments; functions of the day give those that depend on it. "--json FILE" follows,
            unless `writes` is False.
        rehearsed: the words of a rehearsal; None: the same.
        needs: why it cannot run; None where it can.
        environment: variables beside those of this process.
    """

    name: str
    limit_s: float
    words: Callable[[Day], list[str]]
    rehearsed: Callable[[Day], list[str]] | None = None
    needs: Callable[[Day], str | None] = lambda day: None
    environment: Mapping[str, str] = field(default_factory=dict)
    writes: bool = True

    def line(self, day: Day) -> list[str]:
        """The command line."""
        words = (self.rehearsed or self.words)(day) if day.rehearsed else self.words(day)
        script = [str(BENCH / words[0])] if words[0].endswith(".py") else words[:1]
        result = ["--json", str(day.file(self.name))] if self.writes else []
        options = words[1:]
        if "--" in options:  # the rest is another program's
            where = options.index("--")
            return [sys.executable, *script, *options[:where], *result, *options[where:]]
        return [sys.executable, *script, *options, *result]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Commands that take at most `STAGE_S` together."""

    title: str
    commands: tuple[Command, ...]


def words(*fixed: str) -> Callable[[Day], list[str]]:
    return lambda day: list(fixed)


def needs_file(*names: str) -> Callable[[Day], str | None]:
    """The results of other commands."""

    def why_not(day: Day) -> str | None:
        lacking = [name for name in names if not day.file(name).is_file()]
        return f"no {', '.join(f'{name}.json' for name in lacking)} in {day.folder}" if lacking else None

    return why_not


def needs_two_gpus(day: Day) -> str | None:
    return None if day.gpus > 1 else "one GPU here"


def needs_videos(day: Day) -> str | None:
    """A decoder, and the sample videos."""
    from vmae import InputError

    try:
        from vmae.data.decode import find_backends
        from vmae.synthetic.samples import sample_videos

        sample_videos()
        find_backends("video", "auto")
    except (InputError, ImportError) as error:
        return f"synthetic clips alone: {error}"
    return None


def needs_static_model(day: Day) -> str | None:
    found = importlib.util.find_spec("vmae_kernels.predict")
    return None if found or day.rehearsed else "vmae_kernels.build has no --predict in this tree"


def predicted_gpu(device_name: str) -> str | None:
    """The GPU of `harness.floors.GPUS` whose prediction a device is scored against."""
    if "H200" in device_name:
        return "H100"  # the same processors; its memory is faster
    return next((name for name in ("H100", "A100") if name in device_name), None)


def needs_prediction(*names: str) -> Callable[[Day], str | None]:
    def why_not(day: Day) -> str | None:
        if predicted_gpu(day.device_name) is None and not day.rehearsed:
            return f"nothing is predicted for {day.device_name}"
        return needs_file(*names)(day)

    return why_not


def score_words(name: str) -> Callable[[Day], list[str]]:
    return lambda day: [
        "predict.py",
        "--score",
        str(day.file(name)),
        "--gpu",
        predicted_gpu(day.device_name) or "H100",
    ]


def few_predictions(day: Day) -> list[str]:
    """One operation of one preset, where the tree has the static model; it builds for a GPU, which takes no
    GPU."""
    asked = ["--predict", "--operations", "assemble_decoder_tokens", "--presets", "vit_b"]
    there = importlib.util.find_spec("vmae_kernels.predict")
    return ["-m", "vmae_kernels.build", *(asked if there else ["--help"])]


def kernel_score_words(day: Day) -> list[str]:
    files = ["--predicted", str(day.file("kernel_predictions")), "--measured", str(day.file("operations"))]
    return ["kernel_scores.py", *files]


def two_rank_words(*arguments: str) -> Callable[[Day], list[str]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(BENCH / "training_run.py")
    return lambda day: [*launcher, script, "--folder", str(day.folder / "two_ranks"), *arguments]


RIVALS = ["--variants", "reference+sdpa,reference+compile,triton,triton+compile"]
GIANT = ["--model", "vit_g", "--batch", "8", "--steps", "5", "--warmup", "2", "--masking", "dual"]
GIANT += ["--variants", "reference+compile,triton,triton+compile"]
TINY_STEPS = ["--steps", "1", "--warmup", "0", "--input", "synthetic", "--variants", "reference+sdpa,torch"]
TINY_STEPS += ["--masking", "dual"]
FEW_TESTS = ["--", "tests/device", "tests/kernels/test_select_decoded.py", "-m", "device or not slow"]
FEW_TESTS += ["-k", "device or contiguous or one_token"]

STAGES: dict[str, Stage] = {
    "a": Stage(
        title="is it right, and is it faster",
        commands=(
            Command(
                name="device_tests",
                limit_s=140,
                words=words("device_tests.py", "--jobs", "8"),
                rehearsed=words("device_tests.py", "--jobs", "2", *FEW_TESTS),
            ),
            Command(
                name="dual_vs_encoder",
                limit_s=170,
                words=words("dual_vs_encoder.py", "--steps", "10", "--warmup", "3", *RIVALS),
                rehearsed=words("dual_vs_encoder.py", *TINY, *TINY_STEPS),
            ),
            Command(
                name="dual_vs_encoder.vit_g",
                limit_s=90,
                words=words("dual_vs_encoder.py", *GIANT),
                rehearsed=words("dual_vs_encoder.py", *TINY, *TINY_STEPS),
            ),
            Command(
                name="sanitize",
                limit_s=80,
                words=words("sanitize.py", "--limit", "37"),
                rehearsed=words("sanitize.py", "--limit", "60", "--tools", "memcheck"),
            ),
        ),
    ),
    "b": Stage(
        title="kernels and attention against floors and rivals",
        commands=(
            Command(
                name="operations",
                limit_s=250,
                words=words("operations.py", "--rounds", "20"),
                rehearsed=words("operations.py", "--rounds", "2"),
            ),
            Command(
                name="attention",
                limit_s=140,
                words=words("attention.py", "--turns", "15", "--model", "none"),
                rehearsed=words("attention.py", "--quick", "--model", "none", "--backends", "sdpa"),
            ),
            Command(
                name="operations.autotuned",
                limit_s=90,
                words=words("operations.py", "--rounds", "10", "--ours"),
                rehearsed=words("operations.py", "--rounds", "1", "--ours", "--operations", "embed_visible"),
                environment={"VMAE_AUTOTUNE": "1"},
            ),
        ),
    ),
    "c": Stage(
        title="training",
        commands=(
            Command(
                name="training_run.packed",
                limit_s=150,
                words=words("training_run.py", "--input", "packed", "--seconds", "90"),
                rehearsed=words(
                    "training_run.py", "--input", "packed", "--seconds", "3", "--warmup", "1", *TINY
                ),
                needs=needs_videos,
            ),
            Command(
                name="training_run.synthetic",
                limit_s=140,
                words=words("training_run.py", "--seconds", "90"),
                rehearsed=words("training_run.py", "--seconds", "3", "--warmup", "1", *TINY),
            ),
            Command(
                name="step",
                limit_s=60,
                words=words("step.py", "--input", "synthetic", "--variant", "triton+compile"),
                rehearsed=words("step.py", *TINY, "--steps", "1", "--input", "synthetic"),
            ),
            Command(
                name="loop",
                limit_s=50,
                words=words("loop.py", "--model", "vit_b", "--batch", "32", "--dtype", "bfloat16"),
                rehearsed=words("loop.py", *TINY, "--steps", "1", "--warmup", "0"),
            ),
            Command(
                name="training_run.two_ranks",
                limit_s=80,
                words=two_rank_words("--seconds", "30"),
                rehearsed=two_rank_words("--seconds", "2", "--warmup", "1", *TINY),
                needs=needs_two_gpus,
            ),
        ),
    ),
    "d": Stage(
        title="scores, and tables for the documents",
        commands=(
            Command(
                name="kernel_predictions",
                limit_s=240,
                words=words("-m", "vmae_kernels.build", "--predict"),
                rehearsed=few_predictions,
                needs=needs_static_model,
                # Building and interpreting exclude each other; the package need not be installed.
                environment={"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(IMPORTED)},
            ),
            Command(
                name="kernel_scores",
                limit_s=40,
                words=kernel_score_words,
                needs=lambda day: needs_file(
                    "operations", *([] if day.rehearsed else ["kernel_predictions"])
                )(day),
            ),
            Command(
                name="predict.scores",
                limit_s=60,
                words=score_words("dual_vs_encoder"),
                needs=needs_prediction("dual_vs_encoder"),
            ),
            Command(
                name="predict.scores_vit_g",
                limit_s=60,
                words=score_words("dual_vs_encoder.vit_g"),
                needs=needs_prediction("dual_vs_encoder.vit_g"),
            ),
            Command(
                name="blocks", limit_s=40, words=lambda day: ["blocks.py", str(day.folder)], writes=False
            ),
            Command(
                name="readme",
                limit_s=40,
                words=words("readme.py"),
                rehearsed=words("readme.py", "--check"),
                writes=False,
            ),
        ),
    ),
}
