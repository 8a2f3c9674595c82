"""Fine-tuning and testing give the same on any number of ranks: real processes, gloo."""

import json

import pytest
import torch

from vmae.checkpoint.published import load_weights
from vmae.cli import main

SIZE = ["--model", "vit_tiny", "--image-size", "32", "--num-frames", "4", "--stride", "2"]
RUN = ["--num-sample", "1", "--workers", "0", "--log-every", "1", "--no-tensorboard", "--device", "cpu"]


def finetune(world, output, batch, parallel, *flags):
    torch.set_num_threads(1)
    where = [
        "--data",
        str(world / "train.txt"),
        "--output",
        str(output),
        "--batch-size",
        str(batch),
        "--parallel",
        parallel,
    ]
    settings = ["--steps", "3", "--warmup-steps", "0", "--lr", "0.02", "--drop-path", "0", "--ema", "0.5"]
    return main(["finetune", *where, *SIZE, *RUN, *settings, *flags])


def evaluate(world, checkpoint, output):
    torch.set_num_threads(1)
    views = ["--segments", "2", "--crops", "2", "--batch-size", "3", "--workers", "0", "--device", "cpu"]
    return main(
        ["evaluate", str(world / "val.txt"), "--checkpoint", str(checkpoint), "--output", str(output), *views]
    )


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


# Clips are mixed within a micro-batch: the same micro-batches, or no mixing, give the same on any number of
# ranks.
SAME_PARTS, ONE_BATCH = (2, "--accumulate", "2"), (4, "--mixup", "0", "--cutmix", "0")


@pytest.mark.slow
@pytest.mark.parametrize("parallel, alone", [("ddp", SAME_PARTS), ("fsdp", SAME_PARTS), ("ddp", ONE_BATCH)])
def test_two_ranks_train_what_one_does(run_ranks, labelled_world, tmp_path, parallel, alone):
    batch, *flags = alone
    mixing = flags if alone is ONE_BATCH else []
    assert run_ranks(1, finetune, labelled_world, tmp_path / "one", batch, "none", *flags) == [0]
    assert run_ranks(2, finetune, labelled_world, tmp_path / "two", 2, parallel, *mixing) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for name in ("weights.pth", "weights_ema.pth"):
        one, two = (load_weights(tmp_path / run / name) for run in ("one", "two"))
        assert all(torch.allclose(one[key], two[key], atol=2e-4) for key in one), name


@pytest.mark.slow
def test_any_number_of_ranks_tests_the_same(run_ranks, labelled_world, tmp_path):
    assert run_ranks(1, finetune, labelled_world, tmp_path / "run", 4, "none") == [0]
    for ranks in (1, 2, 3):
        assert (
            run_ranks(ranks, evaluate, labelled_world, tmp_path / "run", tmp_path / str(ranks)) == [0] * ranks
        )
    files = [(tmp_path / str(ranks) / "predictions.jsonl").read_text() for ranks in (1, 2, 3)]
    assert files[0] == files[1] == files[2] and len(files[0].splitlines()) == 7
    results = [json.loads((tmp_path / str(ranks) / "results.json").read_text()) for ranks in (1, 2, 3)]
    assert results[0]["top1"] == results[1]["top1"] == results[2]["top1"]
