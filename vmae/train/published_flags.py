"""Flags of the published programs that are no settings here, and what a command line in their words leaves
to their defaults.

Most published flags are settings, under their published names (`aliases` of the fields). The tables below
hold the others: some stand for a setting, the rest change nothing, and a note says why. Sources:
run_mae_pretraining.py and run_class_finetuning.py of OpenGVLab/VideoMAEv2 and of MCG-NJU/VideoMAE, and
DeepSpeed's `add_config_arguments`, which the second program calls.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from vmae.config import PUBLISHED_CLASSIFIERS, PUBLISHED_MODELS
from vmae.data.data_sets import DATA_SETS
from vmae.errors import InputError
from vmae.flags import Layer, OtherFlag, written_flags

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_WARMUP_EPOCHS, _BATCH = {"pretrain": 40.0, "finetune": 5.0}, 64  # defaults of the two programs


_PRETRAIN_MARKS, _FINETUNE_MARKS = ("mask_type", "mask_ratio"), ("data_set", "nb_classes")


def _nothing(name: str, reason: str, words: int | str = 0) -> OtherFlag:
    return OtherFlag(name, f"changes nothing here: {reason}", words)


def _full(_: str) -> dict[str, Any]:
    return {"checkpointing": "full"}


def _normalize(words: str) -> dict[str, Any]:
    if words.lower() in _TRUE or words.lower() in _FALSE:
        return {"normalize_target": words.lower() in _TRUE}
    raise InputError(f"--normlize_target must be True or False, not {words!r}")


def _zero(words: str) -> dict[str, Any]:
    if words not in ("0", "1", "2", "3"):
        raise InputError(f"--zero_stage must be 0, 1, 2 or 3, not {words!r}")
    return {"parallel": "fsdp"} if words == "3" else {}


def _single(words: str) -> dict[str, Any]:
    if words != "1":
        raise InputError(
            f"--num_segments {words}: the published loader cuts one clip of --num_frames, so the model has "
            "tokens for one: give 1, and more --num_frames for longer clips"
        )
    return {}


def _ranks_of_mpi(_: str) -> dict[str, Any]:
    """Take rank and ranks as Open MPI tells them, where no other launcher does."""
    told = {
        "RANK": "RANK",
        "WORLD_SIZE": "SIZE",
        "LOCAL_RANK": "LOCAL_RANK",
        "LOCAL_WORLD_SIZE": "LOCAL_SIZE",
    }
    for name, source in told.items():
        if (value := os.environ.get(f"OMPI_COMM_WORLD_{source}")) is not None:
            os.environ.setdefault(name, value)
    return {}


_LAUNCHER = "the launcher tells each process its rank (torchrun, or python -m torch.distributed.run)"
_DEEPSPEED = (
    "the same results come from --parallel ddp (the default of several ranks) or fsdp; --dtype bfloat16 "
    "takes the place of its float16"
)
_BOTH = (
    _nothing("--pin_mem", "memory is pinned wherever there is a GPU"),
    _nothing("--no_pin_mem", "memory is pinned wherever there is a GPU, which changes no result"),
    _nothing(
        "--imagenet_default_mean_and_std", "clips are always normalised with ImageNet's mean and deviation"
    ),
    _nothing("--world_size", _LAUNCHER, 1),
    _nothing("--local-rank", _LAUNCHER, 1),
    _nothing("--local_rank", _LAUNCHER, 1),
    _nothing("--dist_url", _LAUNCHER, 1),
    OtherFlag("--dist_on_itp", "takes ranks from Open MPI's variables", sets=_ranks_of_mpi, noted=False),
    _nothing(
        "--start_epoch", "a run begins at the step of the checkpoint that it resumes from, else at 0", 1
    ),
    OtherFlag("--with_checkpoint", "is --checkpointing full", sets=_full),
    OtherFlag("--use_checkpoint", "is --checkpointing full", sets=_full),
    _nothing("--save_ckpt", "checkpoints are always saved"),
    _nothing("--no_save_ckpt", "a run without checkpoints could not go on; --keep 1 keeps one"),
    _nothing("--enable_deepspeed", _DEEPSPEED),
    _nothing("--deepspeed", _DEEPSPEED),
    _nothing("--deepspeed_config", f"the file is not read; {_DEEPSPEED}", 1),
    _nothing("--deepspeed_mpi", _LAUNCHER),
    _nothing("--deepscale", "it is DeepSpeed's old name"),
    _nothing("--deepscale_config", "the file is not read; it is DeepSpeed's old name", 1),
    OtherFlag("--zero_stage", f"changes nothing here: {_DEEPSPEED}", 1, _zero),
)
PRETRAIN_FLAGS = (
    *_BOTH,
    OtherFlag(
        "--normlize_target", "is --normalize-target, or --no-normalize-target for False", 1, _normalize
    ),
    _nothing("--color_jitter", "the published pre-training reads it nowhere", 1),
    _nothing("--train_interpolation", "the published pre-training resizes bilinearly, whatever it says", 1),
)
FINETUNE_FLAGS = (
    *_BOTH,
    OtherFlag("--model_ema", "is --ema 0.9999, or --ema of --model_ema_decay", noted=False),
    _nothing("--model_ema_force_cpu", "the average stays beside the weights"),
    _nothing("--color_jitter", "the published fine-tuning reads it nowhere", 1),
    _nothing("--resplit", "the published program reads it nowhere"),
    _nothing("--crop_pct", "the published program reads it nowhere", 1),
    _nothing("--model_key", "the weights are found under model, module and other names", 1),
    _nothing("--model_prefix", "prefixes of names are found and removed", 1),
    _nothing("--eval_data_path", "the published program reads it nowhere; lists are found in --data_path", 1),
    OtherFlag("--num_segments", "changes nothing here: a clip is one segment", 1, _single),
    _nothing("--dist_eval", "every test is shared among the ranks, and no video is counted twice"),
)
# What the table in docs/compatibility.md says of flags that some words of them turn into settings.
WORDS = {
    "--zero_stage": "3: --parallel fsdp; 0, 1, 2: nothing, as --parallel ddp gives the same results",
    "--num_segments": "1: nothing; other numbers are refused, as the published loader cuts one clip",
}


# --- What a command line in published words leaves to its defaults ---


def _published_words(flags: Layer, file: Layer, names: tuple[str, ...], models: dict[str, str]) -> bool:
    """Whether a settings file, or a command line without one, is written in published words: one of `names`,
    or a published name of a model."""
    layer = file if file.written else flags
    return any(name in layer.written for name in names) or layer.written.get("model") in models


def _below(command: str, flags: Layer, file: Layer, given: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Published defaults that differ from those here."""
    below: dict[str, Any] = {}
    if not {"warmup_epochs", "warmup_steps", "steps"} & given.keys():
        usual = _WARMUP_EPOCHS[command]
        if given.get("epochs", epochs) > usual:  # a shorter run is an error there
            below["warmup_epochs"] = usual
    if "effective_batch" not in given:
        below["batch_size"] = _BATCH
    return below


def in_published_words(args: argparse.Namespace) -> bool:
    """Whether a command line of `finetune`, without a settings file, is written in published words."""
    written = Layer(written=dict(written_flags(getattr(args, "words", ()))))
    return not args.config and _published_words(written, Layer(), _FINETUNE_MARKS, PUBLISHED_CLASSIFIERS)


def adapt_pretrain(
    flags: Layer, file: Layer, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """See `vmae.flags.Settings`: published defaults below, what published words mean above, notes."""
    above, notes = resume_as_published(flags, given), []
    published = _published_words(flags, file, _PRETRAIN_MARKS, PUBLISHED_MODELS)
    below = _below("pretrain", flags, file, given, 800) if published else {}
    written = flags.written | file.written
    named = [name for name in ("decoder_mask", "decoder_ratio") if given.get(name) is not None]
    if "decoder_mask_ratio" in written and given.get("decoder_ratio") == 0:
        above["decoder_mask"] = "none"
        notes.append("note: encoder-only masking: --decoder_mask_ratio 0 is no decoder mask, as published")
    elif published and not named:
        below["decoder_mask"] = "none"
        notes.append(
            "note: encoder-only masking: published names without a decoder mask, as in VideoMAE V1's "
            "scripts; for dual masking add --decoder_mask_type run_cell --decoder_mask_ratio 0.5"
        )
    elif published and "decoder_ratio" not in given and given["decoder_mask"] != "none":
        notes.append(
            f"note: dual masking: {given['decoder_mask']} 0.5 for the decoder; the published program takes "
            "none where no --decoder_mask_ratio is given"
        )
    return below, above, notes


def adapt_finetune(
    flags: Layer, file: Layer, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """See `vmae.flags.Settings`."""
    below, above, notes = adapt_data_set(flags, file, given)
    above |= resume_as_published(flags, given)
    if _published_words(flags, file, _FINETUNE_MARKS, PUBLISHED_CLASSIFIERS):
        below |= _below("finetune", flags, file, given, 30)
    written = flags.written | file.written
    if "model_ema" in written and written["model_ema"] is not False:
        below["ema"] = 0.9999
    elif "model_ema_decay" in written:
        notes.append("note: --model_ema_decay averages the weights here, also without --model_ema")
    return below, above, notes


def adapt_data_set(
    flags: Layer, file: Layer, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What `--data_set` decides: see `vmae.data.data_sets`.

    Raises:
        InputError: the class count is another one.
    """
    name = given.get("data_set")
    if name is None:
        return {}, {}, []
    own = DATA_SETS[name]
    count = given.get("num_classes")
    if isinstance(count, int) and count != own.num_classes:
        raise InputError(
            f"--data_set {name} has {own.num_classes} classes, but --num-classes/--nb_classes is {count}: "
            "correct one of them, or leave --data_set out for a list of your own"
        )
    below: dict[str, Any] = {"num_classes": own.num_classes}
    if own.sparse:
        below["sampling"] = "sparse"
    if not own.flip:
        below["flip"] = False
    return below, {}, []


def resume_as_published(flags: Layer, given: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that `--resume` names counts, whatever stands beside it of --(no_)auto_resume."""
    named = flags.written.get("resume")
    if named and {"auto_resume", "no_auto_resume"} & flags.written.keys():
        return {"resume": named}
    return {}
