"""`python -m vmae evaluate LIST`: the multi-view test of a fine-tuned classifier, with the published views.

Each video gives segments x crops views; the softmax of their logits is averaged. Each video is tested once,
by one rank, with any number of ranks and of parts (`--part i/n`, then `--merge`). Predictions are written at
once, so a test that was stopped continues with the videos that are left.

    predictions.jsonl   a line for each video: index, path, labels, the five best classes
    results.json        scores and settings
    classes.csv         a row for each class
    confusion.png       confusion matrix
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vmae.checkpoint.arguments import add_model_arguments, load_from_args
from vmae.checkpoint.classifier import LoadedClassifier
from vmae.checkpoint.identity import list_hash, model_identity
from vmae.config import DTYPE, SpeedConfig, _Checked
from vmae.data.classify_dataset import ClipConfig, ViewConfig, ViewDataset
from vmae.data.label_maps import KINETICS_710, check_mapped_names, is_kinetics, map_name
from vmae.data.labels import LabelledList, read_class_names, read_labelled_list
from vmae.data.manifest import DEFAULT_PATTERN
from vmae.data.part_folder import PartFolder, Records
from vmae.data.parts import WHOLE, Part, add_part_arguments
from vmae.data.quarantine import Failure
from vmae.data.ranks import PATIENCE
from vmae.data.shards.rows import result_name
from vmae.errors import InputError
from vmae.evaluate.scores import TOP, Record, class_table, confusion, draw_confusion, score, write_table
from vmae.evaluate.views import named, view_probabilities
from vmae.files.atomic import write_atomically
from vmae.files.json_files import read_json
from vmae.files.settled import differences
from vmae.flags import add_settings
from vmae.settings import BATCH, limits, ranged
from vmae.train.checks import check_backend, check_output, take_cpu
from vmae.train.finetune_settings import TEST_LISTS, FinetuneConfig, list_of
from vmae.train.metrics import code_version
from vmae.train.parallel import Parallel, open_parallel
from vmae.train.pretrain_settings import RunConfig, TrainingConfig

PREDICTIONS, RESULTS, SETTINGS = "predictions.jsonl", "results.json", "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Checked):
    """Settings of a test.

    Attributes:
        data, data_root: labelled list, or a folder with test.csv or val.csv (the first one that exists).
        frame_pattern, first_frame: file names of frame folders and the number of their first image, where the
            list does not say them.
        views: views of each video; None means the published 5 x 3, or 2 x 3 with sparse sampling.
        dtype: "float32" or "bfloat16".
        keep_scores: write the probabilities of all classes (always done for videos with several labels).
    """

    data: str
    data_root: str | None = None
    frame_pattern: str = DEFAULT_PATTERN
    first_frame: int = ranged(1, limits(FinetuneConfig, "first_frame"))
    views: ViewConfig | None = None
    dtype: str = ranged("float32", DTYPE)
    keep_scores: bool = False

    def read_list(self, num_classes: int) -> LabelledList:
        """The labelled videos; raises InputError where they cannot be read, or have other labels."""
        return read_labelled_list(
            list_of(self.data, TEST_LISTS),
            self.data_root,
            num_classes=num_classes,
            frame_pattern=self.frame_pattern,
            first_frame=self.first_frame,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    text = (
        "labelled list, `path label` a line, an index of shards, or a folder: its test.csv, else its val.csv"
    )
    parser.add_argument("data", metavar="LIST", help=text)
    parser.add_argument("--data-root", metavar="DIR", help="folder at which the list's relative paths start")
    add_settings(parser, FinetuneConfig, "frame_pattern first_frame")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for predictions, scores, table and picture"
    )
    parser.add_argument("--classes", metavar="FILE", help="class names, where the checkpoint has none")
    add_model_arguments(parser)
    test = parser.add_argument_group("the test")
    add_settings(test, ViewConfig, "segments crops")
    add_settings(test, TrainingConfig, "dtype")
    test.add_argument("--scores", action="store_true", help="write the probabilities of all classes")
    add_part_arguments(parser)
    speed = parser.add_argument_group("settings that change speed only")
    speed.add_argument("--batch-size", type=BATCH, default=16, help="views at once (16)")
    add_settings(speed, RunConfig, "device")
    add_settings(speed, SpeedConfig, "num_workers backend attention")


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit code is 1 where a video could not be decoded."""
    if args.merge:
        take_cpu(args)
    with open_parallel("auto", args.device, timeout=PATIENCE) as parallel:
        check_backend(args.backend, parallel.device)
        check_output(Path(args.output))
        loaded = load_from_args(args, backend=args.backend, attention=args.attention)
        views = published_views(loaded.clip.sampling, args.segments, args.crops)
        config = EvaluationConfig(
            data=args.data,
            data_root=args.data_root,
            frame_pattern=args.frame_pattern,
            first_frame=args.first_frame,
            views=views,
            dtype=args.dtype,
            keep_scores=args.scores,
        )
        names = class_names_of(loaded, args)
        if args.label_map is None:
            parallel.on_main(lambda: refuse_other_kinetics(loaded, config))
        speed = {"batch_size": args.batch_size, "workers": args.workers}
        joined = {"part": args.part, "merge": args.merge}
        with _place(args.output, args.part).hold(parallel, merge=args.merge):
            results = evaluate(
                loaded, config, args.output, parallel=parallel, class_names=names, **joined, **speed
            )
    return 1 if results["undecodable"] else 0


def class_names_of(loaded: LoadedClassifier, args: argparse.Namespace) -> tuple[str, ...] | None:
    """The names of `--classes`, else the checkpoint's own.

    Raises:
        InputError: there are more or fewer than the head has classes; or a label map gives them classes of
            other names.
    """
    if not args.classes:
        return loaded.class_names
    names, classes = tuple(read_class_names(args.classes)), loaded.model.num_classes
    if len(names) != classes:
        hint = ""
        if is_kinetics(classes, len(names)):
            hint = f"; --label-map {map_name(len(names))} converts one of Kinetics-710"
        raise InputError(f"{len(names)} class names for a head of {classes} classes{hint}")
    if args.label_map is not None and loaded.class_names is not None:
        check_mapped_names(args.label_map, range(classes), loaded.class_names, names)
    return names


def refuse_other_kinetics(loaded: LoadedClassifier, config: EvaluationConfig) -> None:
    """Raises InputError where a list has just the labels of Kinetics-400, -600 or -700, and the head is of
    Kinetics-710, whose numbers are others."""
    data, head = list_of(config.data, TEST_LISTS), loaded.model.num_classes
    if head != KINETICS_710:
        return
    classes = config.read_list(head).labels
    count = max(max(own) for own in classes) + 1
    if is_kinetics(head, count):
        raise InputError(
            f"{loaded.path} has a head of {head} classes (Kinetics-710), the labels of {data} end at "
            f"{count - 1}, as those of Kinetics-{count} do, which have other numbers: --label-map "
            f"{map_name(count)} (misc/ of the published repository OpenGVLab/VideoMAEv2) converts the head; "
            "--label-map none takes the labels as Kinetics-710's"
        )


def published_views(sampling: str, segments: int | None = None, crops: int | None = None) -> ViewConfig:
    """See `ClipConfig.published_views`."""
    return ClipConfig(sampling=sampling).published_views(segments, crops)


def evaluate(
    loaded: LoadedClassifier,
    config: EvaluationConfig,
    output: str | Path,
    *,
    parallel: Parallel | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 16,
    workers: int = 0,
    move_other: bool = False,
    part: Part = WHOLE,
    merge: bool = False,
) -> dict[str, Any]:
    """Test a classifier on a list, or continue a test that was stopped. All ranks must call it.

    Args:
        output: folder of the test.
        class_names: names of all classes, for the table and the picture; None uses class numbers.
        batch_size: views per forward pass.
        workers: processes of each rank that decode videos; 0 decodes in this process.
        move_other: move what `output` holds of another test to `previous-N` beside it, instead of an error.

        part: test this part of the list only, beside other parts.
        merge: join what the parts have predicted; no model runs.

    Returns:
        Scores, see `vmae.evaluate.scores.score`; the same on every rank. Of a part, only `videos` and
        `undecodable`.

    Raises:
        InputError: the list cannot be read, it has labels that the head does not have, or `output` holds
            another test, or parts of one, or parts of another number; `merge`: videos are missing.
    """
    parallel, folder, model = parallel or Parallel(), Path(output), loaded.model
    data = list_of(config.data, TEST_LISTS)
    labelled = config.read_list(model.num_classes)
    if class_names is not None and len(class_names) != model.num_classes:
        raise InputError(f"{len(class_names)} class names for a head of {model.num_classes} classes")
    views = config.views or published_views(loaded.clip.sampling)
    settings = _identity(loaded, config, views, labelled)
    if move_other:
        parallel.on_main(lambda: _move_other(folder, settings))
    place, count = _place(folder, part), len(labelled.entries)
    records = _records(place)
    parallel.on_main(lambda: place.settle(settings, data=data))
    if merge:
        parallel.on_main(lambda: (records.join(count, "videos"), None)[1])
    about = {**settings, "data": data}
    if parallel.is_main:
        print(f"list: {data}, {count} videos{'' if part.whole else f', part {part}'}", flush=True)
        if loaded.note:
            print(loaded.note, flush=True)
    done = parallel.on_main(lambda: (records.collect(), {record["video"] for record in records.read()})[1])
    todo = [video for video in place.share(count) if video not in done]
    if parallel.is_main and not todo and not merge:
        which = "videos" if part.whole else f"videos of part {part}"
        print(f"nothing to do: {folder} has the predictions of all {which}", flush=True)
    dataset = ViewDataset(labelled.entries, loaded.clip, views, channels=model.config.in_channels)
    model.to(parallel.device)

    def predict(clips: Tensor) -> Record:
        probabilities = view_probabilities(
            model,
            clips,
            device=parallel.device,
            dtype=config.dtype,
            multi_label=settings["multi_label"],
            batch_size=batch_size,
        )
        return describe_prediction(probabilities, settings["scores"])

    if todo:
        parallel.barrier()  # rank 0 has merged the files of an earlier start
        write_share(
            place.own,
            labelled,
            dataset,
            todo,
            predict,
            rank=parallel.rank,
            world_size=parallel.world_size,
            workers=workers,
        )
        parallel.barrier()

    def end() -> dict[str, Any]:
        return finish(folder, labelled, about, class_names) if part.whole else _finish_part(records, count)

    return parallel.on_main(end)


def _place(folder: str | Path, part: Part) -> PartFolder:
    return PartFolder(Path(folder), part, "a test", "another test", SETTINGS)


def _records(place: PartFolder) -> Records:
    return Records(place, PREDICTIONS, "video", "predictions-{}.part.jsonl")


def _finish_part(records: Records, count: int) -> dict[str, Any]:
    """Say what this part has found."""
    records.collect()
    own = set(records.place.share(count))
    found = [record for record in records.read() if record["video"] in own]
    _say_undecodable(found)
    bad = sum("error" in record for record in found)
    print(f"part {records.place.part}: {len(found) - bad} videos tested, {bad} could not be decoded")
    return {"videos": len(found) - bad, "undecodable": bad}


def _say_undecodable(records: Sequence[Record]) -> None:
    for record in records:
        if "error" in record:
            print(f"could not be decoded, and does not count: {record['error']}")


def _move_other(folder: Path, settings: dict[str, Any]) -> None:
    """Move the files of a test with other settings aside, and say so."""
    if not (folder / SETTINGS).exists():
        return
    before = read_json(folder / SETTINGS, "settings file")
    if not differences(before, json.loads(json.dumps(settings))):
        return
    parent = folder.parent
    number = next(n for n in itertools.count(1) if not (parent / f"previous-{n}" / folder.name).exists())
    target = parent / f"previous-{number}" / folder.name
    try:
        target.mkdir(parents=True)
        for path in sorted(folder.iterdir()):
            if not path.name.startswith("."):  # the lock stays
                path.rename(target / path.name)
    except OSError as error:
        raise InputError(f"cannot move the earlier test in {folder} to {target}: {error.strerror}") from error
    print(f"note: moved an earlier test with other weights or settings to {target}", flush=True)


def _identity(
    loaded: LoadedClassifier, config: EvaluationConfig, views: ViewConfig, labelled: LabelledList
) -> dict[str, Any]:
    """Everything that decides the scores of a test."""
    multi_label = loaded.multi_label or labelled.multi
    return {
        **model_identity(loaded.model),
        "clip": {**loaded.clip.to_dict(), "image_size": loaded.model.config.image_hw},
        "views": views.to_dict(),
        "dtype": config.dtype,
        "videos": len(labelled.entries),
        "list": list_hash(labelled.entries, labelled.labels),
        "multi_label": multi_label,
        "scores": config.keep_scores or multi_label,
    }


def write_share(
    folder: Path,
    labelled: LabelledList,
    dataset: ViewDataset,
    todo: Sequence[int],
    predict: Callable[[Tensor], Record],
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> None:
    """Test this rank's share of the videos, and write a line for each video at once.

    Args:
        todo: indices of the videos that all ranks together have to test.
        predict: record of a video, from its views, uint8 [V, T, H, W, 3].
    """
    own = todo[rank::world_size]
    hide_bar = True if rank else None  # None: tqdm hides it where there is no terminal
    with _records(_place(folder, WHOLE)).writer(rank) as write:
        videos = dataset.read(own, workers)
        for video, clips in tqdm(videos, total=len(own), unit="video", disable=hide_bar):
            path = result_name(labelled.entries[video])
            record: Record = {"video": video, "path": path, "labels": labelled.labels[video]}
            try:
                if isinstance(clips, Failure):
                    record["error"] = clips.error
                else:
                    record |= predict(clips)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
            write(record)


def describe_prediction(probabilities: Tensor, keep_scores: bool) -> Record:
    """Record of a prediction: the `TOP` best classes (`top`), and with `keep_scores` all probabilities
    (`scores`)."""
    best = probabilities.topk(min(TOP, len(probabilities)))
    record: Record = {"top": [[int(k), float(p)] for p, k in zip(best.values, best.indices)]}
    if keep_scores:
        record["scores"] = probabilities.tolist()
    return record


def finish(
    folder: Path, labelled: LabelledList, settings: dict[str, Any], class_names: Sequence[str] | None
) -> dict[str, Any]:
    """Write scores, table and picture of all predictions in the folder, and print a report.

    Returns:
        Scores, see `vmae.evaluate.scores.score`.

    Raises:
        InputError: no video could be decoded, or a file can't be written.
    """
    records = _records(_place(folder, WHOLE)).collect()
    results = score(records, labelled.labels, labelled.num_classes)
    about = {**results, "settings": settings, "torch": torch.__version__, **code_version()}
    write_atomically(
        folder / RESULTS, lambda file: file.write(json.dumps(about, indent=1) + "\n"), binary=False
    )
    _say_undecodable(records)
    if not results["videos"]:
        raise InputError(f"no video of {settings['data']} could be decoded")
    matrix = confusion(records, labelled.labels, labelled.num_classes)
    names = named(range(labelled.num_classes), class_names)
    rows = class_table(matrix, names)
    write_table(folder / "classes.csv", rows)
    draw_confusion(folder / "confusion.png", matrix, names)
    for line in _report(results, settings, rows, folder):
        print(line)
    return results


def _report(
    results: dict[str, Any], settings: dict[str, Any], rows: list[dict[str, Any]], folder: Path
) -> list[str]:
    views = settings["views"]
    lines = [
        f"{results['videos']} videos, {settings['clip']['num_frames']} frames x "
        f"{views['segments']} segments x {views['crops']} crops, "
        f"{ClipConfig.from_dict(settings['clip']).describe_pixels()}",
        f"top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} %, mean class accuracy "
        f"{results['mean_class_accuracy']:.2f} %",
    ]
    if "mean_average_precision" in results:
        lines.append(f"mean average precision {results['mean_average_precision']:.2f} %")
    worst = sorted(rows, key=lambda row: row["accuracy"])[:10]
    width = max(len(row["name"]) for row in worst)
    which = " (the ten worst)" if len(rows) > 10 else ""
    lines.append(f"{'class':{width}}  videos  accuracy  mistaken for{which}")
    lines += [
        f"{row['name']:{width}}  {row['videos']:6}  {row['accuracy']:7.1f}%  {row['taken_for']}"
        for row in worst
    ]
    return [*lines, f"in {folder}: {PREDICTIONS}, {RESULTS}, classes.csv, confusion.png"]
