"""A file as the published ones are, all the way: post-pre-training, fine-tuning, testing, exporting."""

import argparse
import json

import torch

from vmae import ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.published import load_weights
from vmae.cli import main

SIZE = ["--num-frames", "4", "--image-size", "32"]
RUN = [
    "--stride",
    "2",
    "--batch-size",
    "4",
    "--num-sample",
    "1",
    "--workers",
    "0",
    "--no-tensorboard",
    "--device",
    "cpu",
]


def test_published_file_to_export(labelled_world, tmp_path, capsys):
    torch.manual_seed(0)
    config = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
    official = tmp_path / "pretrain.pth"
    torch.save(
        {"module": build_pretrainer(config).state_dict(), "args": argparse.Namespace(lr=1.0, opt="adamw")},
        official,
    )
    data = labelled_world / "train.txt"
    start = ["--init", str(official), "--init-frames", "4", "--init-size", "32", "--model", "vit_tiny", *SIZE]
    assert (
        main(
            [
                "finetune",
                "--data",
                str(data),
                "--output",
                str(tmp_path / "post"),
                *start,
                *RUN,
                "--steps",
                "2",
                "--classes",
                str(labelled_world / "classes.txt"),
            ]
        )
        == 0
    )
    (tmp_path / "two.txt").write_text(
        "".join(line for line in data.read_text().splitlines(True) if not line.endswith(" 2\n"))
    )
    (tmp_path / "label_3to2.json").write_text("[0, 1]")
    assert (
        main(
            [
                "finetune",
                "--data",
                str(tmp_path / "two.txt"),
                "--output",
                str(tmp_path / "fine"),
                *RUN,
                "--steps",
                "2",
                "--init",
                str(tmp_path / "post"),
                "--label-map",
                str(tmp_path / "label_3to2.json"),
            ]
        )
        == 0
    )
    assert "head of 3 classes converted to 2" in capsys.readouterr().out
    test = ["--segments", "2", "--crops", "1", "--workers", "0", "--device", "cpu"]
    assert (
        main(
            [
                "evaluate",
                str(tmp_path / "two.txt"),
                "--checkpoint",
                str(tmp_path / "fine"),
                "--output",
                str(tmp_path / "test"),
                *test,
            ]
        )
        == 0
    )
    assert main(["export", str(tmp_path / "fine"), str(tmp_path / "out.pth")]) == 0
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    fresh = build_classifier(config, 2)
    fresh.load_state_dict(content["model"])  # published names, all of them
    assert (
        main(
            [
                "evaluate",
                str(tmp_path / "two.txt"),
                "--checkpoint",
                str(tmp_path / "out.pth"),
                "--output",
                str(tmp_path / "again"),
                *test,
            ]
        )
        == 0
    )
    first, again = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("test", "again"))
    assert first["top1"] == again["top1"] and first["settings"]["weights"] == again["settings"]["weights"]
    assert load_weights(tmp_path / "out.pth")["head.weight"].shape == (2, 128)
