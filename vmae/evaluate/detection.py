"""`python -m vmae detect`: actions of the persons in given boxes at key frames.

    detections.csv    a line for each box and action; score: the person box's score times the sigmoid of the
                      action's logit, as published
    results.json      frame mAP by each of AVA's rules, average precision of each action, settings (with
                      --annotations)
    actions.csv       a row for each action (with --annotations)
    key_frame_*.png   some key frames with their boxes and actions

Boxes are those of --persons; without it, the annotated ones. Scores are written at once, so a test that was
stopped continues with the key frames that are left; ranks and parts (`--part i/n`, then `--merge`) share
them. With --detections no model runs: these are scored.

The frame mAP is that of VideoMAE's evaluation code, unless --per-frame or --unannotated say otherwise;
`results.json` has it by every rule that AVA's scripts have had (`vmae.evaluate.frame_map`).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from vmae.checkpoint.arguments import add_source_arguments
from vmae.checkpoint.identity import content_hash, frames_identity, model_identity
from vmae.checkpoint.models import to_model
from vmae.checkpoint.source import read_checkpoint
from vmae.config import ModelConfig, SpeedConfig
from vmae.data.ava import (
    AvaBox,
    GroundTruth,
    Key,
    read_actions,
    read_detections,
    read_excluded,
    read_ground_truth,
    read_person_boxes,
    write_detections,
)
from vmae.data.detection_dataset import KeyClipConfig, KeyFrame, KeyFrameReader, find_videos, key_frames
from vmae.data.part_folder import PartFolder, Records
from vmae.data.parts import Part, add_part_arguments
from vmae.data.quarantine import Failure
from vmae.data.ranks import PATIENCE
from vmae.errors import InputError
from vmae.evaluate.detection_pictures import draw_frames
from vmae.evaluate.frame_map import RULES, UNANNOTATED, FrameScores, Rule, frame_map
from vmae.evaluate.views import NO_NUMBERS
from vmae.files.atomic import write_atomically
from vmae.files.folder_lock import FolderLock
from vmae.files.settled import check_same
from vmae.flags import add_settings
from vmae.model.detector import Detector
from vmae.settings import BATCH, COUNT, Real, Whole
from vmae.train.checks import check_backend, check_output, take_cpu
from vmae.train.detection_settings import DetectionConfig
from vmae.train.metrics import code_version, read_log
from vmae.train.parallel import Parallel, open_parallel
from vmae.train.pretrain_settings import RunConfig, TrainingConfig

DETECTIONS, RESULTS = "detections.csv", "results.json"
SETTINGS, SCORES = "detection.json", "scores.part.jsonl"
# Neighbouring key frames that one part has, in order. A batch has frames of one block: which frames are
# together in it, on which the last bits of a score depend, is the same for any number of parts and after any
# stop.
BLOCK = 16
CLIP_FLAGS = ("stride", "origin", "preprocess", "num_frames", "image_size")
SAID = 3  # wrong rows that are shown


@dataclass
class LoadedDetector:
    """A detector in eval mode on the CPU.

    Attributes:
        model: detector with its weights.
        path: file of the weights.
        clip: clip settings of the training, with the caller's changes.
        actions: action names by id, in the order of the outputs.
        note: one line on the weights that were loaded, and one on settings that the file does not hold and
            that were assumed.
    """

    model: Detector
    path: Path
    clip: KeyClipConfig
    actions: dict[int, str]
    note: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--checkpoint", metavar="DIR|FILE", help="a run's folder, a checkpoint, or weights")
    parser.add_argument(
        "--videos",
        metavar="DIR",
        help="folder of the videos: ID.mp4 (or another suffix), or a folder ID of images",
    )
    parser.add_argument(
        "--detections",
        metavar="CSV",
        help="score these with --annotations and --actions, and run no model",
    )
    parser.add_argument(
        "--persons", metavar="CSV", help="person boxes with scores (default: the annotated boxes)"
    )
    parser.add_argument(
        "--min-score",
        type=Real(least=0, most=1000),
        default=0.8,
        help="least score of a person box (0.8, as published)",
    )
    parser.add_argument("--annotations", metavar="CSV", help="ground truth, to score the detections")
    parser.add_argument("--actions", metavar="PBTXT", help="actions that count (default: the checkpoint's)")
    parser.add_argument("--excluded", metavar="CSV", help="key frames that do not count")
    parser.add_argument(
        "--per-frame",
        type=COUNT,
        metavar="N",
        help="score the N best detections of a key frame; ActivityNet's script takes 50 (all, as VideoMAE's "
        "code)",
    )
    parser.add_argument(
        "--unannotated",
        choices=UNANNOTATED,
        default="count",
        help="detections on key frames that the annotations do not name: count (as wrong, as VideoMAE's "
        "code) or ignore (as ActivityNet's script since 2020) (count)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for detections, scores and pictures"
    )
    parser.add_argument("--pictures", type=Whole(0, 10_000), default=4, help="key frames to draw (4)")
    add_settings(parser, DetectionConfig, "frame_pattern fps")
    clip = parser.add_argument_group("clips of key frames (default: as in training)")
    add_settings(clip, KeyClipConfig, "stride origin preprocess", unset="as in training")
    add_settings(clip, DetectionConfig, "roi", unset="as in training")
    add_settings(clip, ModelConfig, "num_frames img_size", unset="as in training")
    add_settings(clip, TrainingConfig, "dtype")
    add_source_arguments(parser, "official files; they need --actions")
    add_part_arguments(parser)
    speed = parser.add_argument_group("settings that change speed only")
    speed.add_argument("--batch-size", type=BATCH, default=8, help=f"clips at once, {BLOCK} at most (8)")
    add_settings(speed, RunConfig, "device")
    add_settings(speed, SpeedConfig, "num_workers backend attention")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code is 1 where a video could not be decoded."""
    check_output(Path(args.output))
    if args.detections is not None:
        return _score_file(args)
    if missing := [f"--{name}" for name in ("checkpoint", "videos") if getattr(args, name) is None]:
        raise InputError(f"the following arguments are required: {', '.join(missing)} (or --detections)")
    if args.persons is None and args.annotations is None:
        raise InputError("which boxes? Give --persons, or --annotations for the annotated ones")
    if args.merge:
        take_cpu(args)
    with open_parallel("auto", args.device, timeout=PATIENCE) as parallel:
        return _test(args, parallel)


def _test(args: argparse.Namespace, parallel: Parallel) -> int:
    """Score key frames by the model of a checkpoint."""
    check_backend(args.backend, parallel.device)
    listed = read_actions(args.actions) if args.actions else None
    loaded = load_detector(
        args.checkpoint,
        preset=args.model,
        source=(args.init_frames, args.init_size),
        actions=listed,
        clip={name: getattr(args, name) for name in CLIP_FLAGS},
        roi=args.roi,
        backend=args.backend,
        attention=args.attention,
    )
    counted = loaded.actions if listed is None else listed
    truth = read_ground_truth(args.annotations, counted, skip_unlisted=True) if args.annotations else None
    excluded = read_excluded(args.excluded) if args.excluded else set()
    frames, dropped = _frames_to_test(args, loaded, truth, excluded)
    if parallel.is_main:
        _say_dropped(args.persons, dropped)
        print(loaded.note, flush=True)
    place = PartFolder(Path(args.output), args.part, "a test of a detector", "another test", SETTINGS, BLOCK)

    def end(records: list[dict[str, Any]]) -> int:
        if not args.part.whole:
            return _say_part(args.part, records)
        about = {"checkpoint": str(loaded.path), "dropped": len(dropped), "first_dropped": dropped[:SAID]}
        return _finish(args, loaded, frames, records, truth, counted, excluded, about)

    with place.hold(parallel, merge=args.merge):
        records = score_frames(
            loaded,
            frames,
            place,
            parallel=parallel,
            dtype=args.dtype,
            batch_size=args.batch_size,
            workers=args.workers,
            merge=args.merge,
        )
        return parallel.on_main(lambda: end(records))


def _say_failed(records: Sequence[dict[str, Any]]) -> int:
    """How many key frames could not be decoded; prints which."""
    failed = [record["error"] for record in records if "error" in record]
    for error in failed:
        print(f"could not be decoded, and has no detections: {error}")
    return len(failed)


def _say_part(part: Part, records: Sequence[dict[str, Any]]) -> int:
    """What a part has done; the command's exit code."""
    failed = _say_failed(records)
    print(f"part {part}: {len(records) - failed} key frames scored, {failed} could not be decoded")
    return 1 if failed else 0


def _finish(
    args: argparse.Namespace,
    loaded: LoadedDetector,
    frames: Sequence[KeyFrame],
    records: Sequence[dict[str, Any]],
    truth: GroundTruth | None,
    counted: dict[int, str],
    excluded: set[Key],
    about: dict[str, Any],
) -> int:
    """Write detections, scores and pictures of all key frames; the command's exit code."""
    folder = Path(args.output)
    rows = detections_of(frames, records, list(loaded.actions))
    write_detections(folder / DETECTIONS, rows)
    failed = _say_failed(records)
    print(f"{len(rows)} detections on {len(frames) - failed} key frames: {folder / DETECTIONS}")
    if truth is not None:
        # Scored from the file, whose numbers are rounded: scoring it again gives the same result.
        found = read_detections(folder / DETECTIONS, loaded.actions)
        report(folder, truth, found, counted, excluded, _rule_of(args), about)
    boxes = None if truth is None else truth.rows
    for path in draw_frames(folder, frames, records, boxes, loaded.actions, args.pictures):
        print(f"picture: {path}")
    return 1 if failed else 0


def _score_file(args: argparse.Namespace) -> int:
    """Score the detections of a file; no model runs."""
    if args.annotations is None or args.actions is None:
        raise InputError("--detections is scored with --annotations and --actions: give both")
    if args.checkpoint is not None or args.persons is not None:
        raise InputError("--detections runs no model: leave out --checkpoint and --persons")
    if args.merge or not args.part.whole:
        raise InputError("--detections runs no model, and has no parts: leave out --part and --merge")
    actions = read_actions(args.actions)
    truth = read_ground_truth(args.annotations, actions, skip_unlisted=True)
    excluded = read_excluded(args.excluded) if args.excluded else set()
    dropped: list[str] = []
    found = read_detections(args.detections, actions, dropped=dropped)
    _say_dropped(args.detections, dropped)
    about = {"detections_of": str(args.detections), "dropped": len(dropped), "first_dropped": dropped[:SAID]}
    with FolderLock(args.output, "a test of a detector"):
        report(Path(args.output), truth, found, actions, excluded, _rule_of(args), about)
    return 0


def _say_dropped(path: str, dropped: Sequence[str]) -> None:
    if dropped:
        print(f"note: {len(dropped)} rows of {path} are wrong, or of no listed action, and were dropped:")
        for line in dropped[:SAID]:
            print(f"  {line}")


def _rule_of(args: argparse.Namespace) -> Rule:
    """The rule that the flags name."""
    rule = Rule(per_frame=args.per_frame, unannotated=args.unannotated, source="as the flags say")
    known = (
        one
        for one in RULES.values()
        if (one.per_frame, one.unannotated) == (rule.per_frame, rule.unannotated)
    )
    return next(known, rule)


def _frames_to_test(
    args: argparse.Namespace, loaded: LoadedDetector, truth: GroundTruth | None, excluded: set[Key]
) -> tuple[list[KeyFrame], list[str]]:
    """Key frames with the boxes of --persons, or else of the annotations, without the excluded ones; and
    lines on the rows of --persons that were dropped."""
    source = args.persons or args.annotations
    dropped: list[str] = []
    boxes = [] if truth is None else truth.rows
    if args.persons:
        boxes = read_person_boxes(args.persons, args.min_score, dropped=dropped)
    rows = [row for row in boxes if row.key not in excluded]
    if not rows:
        raise InputError(f"{source}: all boxes are on excluded key frames")
    entries = find_videos(args.videos, [row.video for row in rows], pattern=args.frame_pattern)
    return key_frames(rows, source, entries, loaded.clip, fps=args.fps, videos=args.videos), dropped


def load_detector(
    checkpoint: str | Path,
    *,
    preset: str | None = None,
    source: tuple[int | None, int | None] = (None, None),
    actions: dict[int, str] | None = None,
    clip: dict[str, Any] | None = None,
    roi: str | None = None,
    **options: str,
) -> LoadedDetector:
    """The detector of a checkpoint, ready to test.

    Args:
        checkpoint: see `read_checkpoint`.
        preset: architecture, for files that do not say it (official ones: their outputs are the ids from 1,
            and their clips and RoIAlign the published ones).
        source: frames and side of the clips that the weights are of, for files that do not say it.
        actions: names by id, for files that do not hold them.
        clip: settings of `KeyClipConfig` to change; None changes nothing.
        roi: another RoIAlign than that of the training.
        options: `backend` and `attention`.

    Raises:
        InputError: the file can't be read, is not a detector's, or does not tell its architecture or actions.
    """
    read = read_checkpoint(checkpoint, preset=preset, frames=source[0], size=source[1])
    settings, state = read.settings, read.state
    trained = {"clip": settings.get("clip", {}), "roi": settings.get("roi", "aligned")}
    if "model" in settings:
        if "action_ids" not in settings:
            raise InputError(
                f"{read.path} is not a detector's; `python -m vmae finetune-detection --init {checkpoint}` "
                "makes one"
            )
        known = dict(zip(settings["action_ids"], settings["action_names"]))
    else:
        if read.known is None or actions is None or "head.weight" not in state:
            raise InputError(
                f"{read.path} does not say what it is; name --model and --actions (and it needs a head)"
            )
        count = state["head.weight"].shape[0]
        known = {number: actions.get(number, str(number)) for number in range(1, count + 1)}
        told = settings.get("clip", {})  # the arguments of a published training
        stride = {name: told[name] for name in ("stride",) if name in told}
        trained = {"clip": {"preprocess": "published", **stride}, "roi": "published"}
    size = {"num_frames": read.config.num_frames, "image_size": read.config.img_size}
    changes = {name: value for name, value in (clip or {}).items() if value is not None}
    seen = KeyClipConfig.from_dict({**size, **trained["clip"], **changes})
    shape = {"num_frames": seen.num_frames, "img_size": seen.image_size}
    model, report = to_model(read, "detector", shape, num_classes=len(known), **options)
    model.roi, model.preprocess = roi or trained["roi"], seen.preprocess
    note = f"{read.describe(report)}; --preprocess {seen.preprocess}, --roi {model.roi}"
    return LoadedDetector(model, read.path, seen, known, note)


# --- Scores ---


def score_frames(
    loaded: LoadedDetector,
    frames: Sequence[KeyFrame],
    place: PartFolder,
    *,
    parallel: Parallel,
    dtype: str = "float32",
    batch_size: int = 8,
    workers: int = 0,
    merge: bool = False,
) -> list[dict[str, Any]]:
    """Record of each key frame of this part, in order: `frame` (its index) and `scores` (for each box, a list
    over the actions), or `error`. All ranks must call it; those but the main one get nothing.

    Records that an earlier start of the same test has written are kept.

    Args:
        place: where the part writes; who calls this holds it.
        merge: join what the parts have scored; no model runs.

    Raises:
        InputError: the folder holds another test, can't be written, or key frames are missing (`merge`).
    """
    model = loaded.model.to(parallel.device)
    boxes = content_hash([(*frames_identity(frame), frame.frame, frame.boxes) for frame in frames])
    clip = {**loaded.clip.to_dict(), "image_size": model.config.image_hw}
    about = {**model_identity(model), "clip": clip, "roi": model.roi, "dtype": dtype}
    about |= {"key_frames": len(frames), "boxes": boxes}
    records = Records(place, SCORES, "frame", "scores-{}.part.jsonl", header=about)

    def begin() -> dict[int, bool]:
        """Whether each key frame that is done could be decoded."""
        _check_header(place.folder, about)
        place.settle(about)
        if merge:
            records.join(len(frames), "key frames")
        records.collect()
        return {record["frame"]: "error" not in record for record in records.read()}

    done = parallel.on_main(begin)
    own = place.share(len(frames))
    left = sorted({number // BLOCK for number in own if number not in done})
    mine = set(left[parallel.rank :: parallel.world_size])
    # A block that is not done is done whole; of its frames, those that cannot be decoded are known.
    todo = [number for number in own if number // BLOCK in mine and done.get(number, True)]
    if left:
        parallel.barrier()  # rank 0 has merged the files of an earlier start
        show = None if parallel.is_main else True
        with records.writer(parallel.rank) as write:
            for record in _score(
                model, frames, todo, loaded.clip, parallel.device, dtype, batch_size, workers, show
            ):
                write(record)
        parallel.barrier()
    if not parallel.is_main:
        return []
    records.collect()
    found = {record["frame"]: record for record in records.read()}
    return [found[number] for number in own]


def _check_header(folder: Path, about: dict[str, Any]) -> None:
    """Raises InputError where the scores in `folder` are of another test, or of no test; earlier versions
    wrote down what they depend on at their head alone."""
    before = read_log(folder / SCORES)
    if before:
        header = {"roi": "aligned", **before[0]}  # of versions that had no other
        if isinstance(header.get("clip"), dict):
            header["clip"] = {"preprocess": "resize", **header["clip"]}
        remedy = f"choose another --output, or remove {folder / SCORES}"
        check_same(header, about, f"{folder} holds another test", remedy)


@torch.no_grad()
def _score(
    model: Detector,
    frames: Sequence[KeyFrame],
    todo: Sequence[int],
    clip: KeyClipConfig,
    device: torch.device,
    dtype: str,
    batch_size: int,
    workers: int,
    hide_bar: bool | None,
) -> Iterator[dict[str, Any]]:
    """Record of each key frame of `todo`: of a failure at once, of others as soon as their batch is done; a
    batch has frames of one block."""
    reader = KeyFrameReader(frames, clip)
    waiting: dict[torch.Size, list[_Sample]] = {}  # a batch has clips of one shape
    samples = reader.read(todo, workers)
    block = None
    for number, sample in tqdm(samples, total=len(todo), unit="clip", disable=hide_bar):
        if number // BLOCK != block:
            for batch in waiting.values():
                yield from _score_batch(model, frames, batch, device, dtype)
            waiting, block = {}, number // BLOCK
        if isinstance(sample, Failure):
            yield {"frame": number, "error": sample.error}
            continue
        batch = waiting.setdefault(sample[0].shape, [])
        batch.append(_Sample(number, *sample))
        if len(batch) == batch_size:
            yield from _score_batch(model, frames, waiting.pop(sample[0].shape), device, dtype)
    for batch in waiting.values():
        yield from _score_batch(model, frames, batch, device, dtype)


class _Sample(NamedTuple):
    """Clip and boxes of the key frame `frame`: uint8 [T, H, W, 3], float32 [M, 4]."""

    frame: int
    clip: Tensor
    boxes: Tensor


def _score_batch(
    model: Detector, frames: Sequence[KeyFrame], batch: Sequence[_Sample], device: torch.device, dtype: str
) -> Iterator[dict[str, Any]]:
    boxes = torch.nn.utils.rnn.pad_sequence([sample.boxes for sample in batch], batch_first=True)
    clips = torch.stack([sample.clip for sample in batch])
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(clips.to(device), boxes.to(device))
    if logits.isnan().any():
        some = ", ".join(sorted({frames[sample.frame].path for sample in batch}))
        raise InputError(f"the model's output on {some} is not a number (NaN); {NO_NUMBERS}")
    for sample, scores in zip(batch, logits.float().sigmoid().cpu()):
        yield {"frame": sample.frame, "scores": scores[: len(sample.boxes)].tolist()}


def detections_of(
    frames: Sequence[KeyFrame], records: Sequence[dict[str, Any]], actions: Sequence[int]
) -> list[AvaBox]:
    """Detections: a row for each box and action; its score is the action's times the person's.

    Args:
        actions: action ids of the outputs, in order.
    """
    return [
        AvaBox(frame.video, frame.timestamp, box, action, person * score)
        for frame, record in zip(frames, records)
        for box, person, scores in zip(frame.boxes, frame.scores, record.get("scores", ()))
        for action, score in zip(actions, scores)
    ]


def report(
    folder: Path,
    truth: GroundTruth,
    found: Sequence[AvaBox],
    actions: dict[int, str],
    excluded: set[Key],
    rule: Rule,
    about: dict[str, Any],
) -> None:
    """Score detections by `rule` and by all `RULES`, write `results.json` and `actions.csv`, and print them.

    Args:
        actions: names of the actions that count, by id.
        about: more for `results.json`.

    Raises:
        InputError: see `frame_map`; a file can't be written.
    """
    by_rule: dict[tuple, FrameScores] = {}

    def score(one: Rule) -> FrameScores:
        key = one.per_frame, one.unannotated
        if key not in by_rule:
            named = truth.frames if one.unannotated == "ignore" else None
            by_rule[key] = frame_map(
                truth.rows, found, actions, excluded=excluded, per_frame=one.per_frame, frames=named
            )
        return by_rule[key]

    scores = score(rule)
    rules = {name: {"frame_map": 100 * score(one).mean, **asdict(one)} for name, one in RULES.items()}
    results = {
        "frame_map": 100 * scores.mean,
        "rule": asdict(rule),
        "rules": rules,
        **asdict(scores),
        **about,
        "torch": torch.__version__,
        **code_version(),
    }
    write_atomically(
        folder / RESULTS, lambda file: file.write(json.dumps(results, indent=1) + "\n"), binary=False
    )
    _write_actions_table(folder, scores, actions)
    print(
        f"frame mAP at IoU 0.5: {100 * scores.mean:.2f} % over {len(scores.actions)} actions, "
        f"{sum(scores.truth.values())} annotations on {scores.key_frames} key frames, "
        f"{scores.detections} detections counted ({rule}: {rule.source})"
    )
    for name, one in RULES.items():
        print(f"  {name}: {rules[name]['frame_map']:.2f} % ({one})")
    width = max(len(name) for name in (*actions.values(), "action"))
    print(f"{'action':{width}}  boxes  average precision")
    for number, precision in sorted(scores.actions.items(), key=lambda item: round(100 * item[1], 2)):
        print(f"{actions[number]:{width}}  {scores.truth[number]:5}  {100 * precision:6.2f} %")


def _write_actions_table(folder: Path, scores: FrameScores, actions: dict[int, str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["action", "name", "boxes", "average_precision"])
    rows = []
    for number, precision in scores.actions.items():
        rows.append((number, actions[number], scores.truth[number], f"{100 * precision:.2f}"))
    writer.writerows(rows)
    write_atomically(folder / "actions.csv", lambda file: file.write(text.getvalue()), binary=False)
