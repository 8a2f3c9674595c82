"""Recipes of supervised training: published numbers, written down here once more, on any number of GPUs."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from vmae import ModelConfig
from vmae.cli import build_parser
from vmae.train.finetune_settings import configs_from_args, model_from_args

RECIPES = Path(__file__).parents[2] / "recipes"
# batch, epochs, warm-up, learning rate for 256, layer decay, drop path, weight decay, clipping, classes,
# sampling, views
TABLE = {
    "postpretrain_vitg_k710": (96, 35, 5, 1e-3, 0.9, 0.3, 0.1, 5.0, 710, "dense", "5 x 3"),
    "finetune_vitg_k400": (96, 3, 1, 1e-5, 0.9, 0.25, 0.1, None, 400, "dense", "5 x 3"),
    "finetune_vitg_k600": (96, 3, 1, 1e-5, 0.9, 0.25, 0.1, None, 600, "dense", "5 x 3"),
    "finetune_vitg_ssv2": (96, 20, 5, 3e-4, 0.9, 0.25, 0.05, None, 174, "sparse", "2 x 3"),
    "finetune_vitg_ucf101": (96, 50, 5, 5e-4, 0.9, 0.3, 0.1, 5.0, 101, "dense", "5 x 3"),
    "finetune_vitg_hmdb51": (96, 50, 5, 5e-4, 0.9, 0.3, 0.1, 5.0, 51, "dense", "5 x 3"),
    "finetune_vitb_k400": (512, 90, 5, 7e-4, 0.75, 0.1, 0.05, None, 400, "dense", "5 x 3"),
    "finetune_vitb_ssv2": (256, 25, 5, 2e-3, 0.65, 0.1, 0.05, None, 174, "sparse", "2 x 3"),
    "finetune_vitl_k400": (128, 35, 5, 2e-3, 0.75, 0.1, 0.05, None, 400, "dense", "5 x 3"),
    "finetune_vitl_ssv2": (128, 20, 5, 5e-4, 0.8, 0.2, 0.05, None, 174, "sparse", "2 x 3"),
    "finetune_vith_k400": (512, 50, 5, 1e-3, 0.75, 0.2, 0.05, None, 400, "dense", "5 x 3"),
    "finetune_vith_ssv2": (128, 20, 5, 5e-4, 0.8, 0.2, 0.05, None, 174, "sparse", "2 x 3"),
    "distill_vitg_to_vitb": (512, 90, 5, 7e-4, 0.75, 0.1, 0.05, None, 710, "dense", "5 x 3"),
    "distill_vitg_to_vits": (512, 90, 5, 7e-4, 0.75, 0.1, 0.05, None, 710, "dense", "5 x 3"),
}
SIZES = {"s": 384, "b": 768, "l": 1024, "h": 1280, "g": 1408}


def run(recipe: str, *words: str, cwd: Path, **variables: object) -> subprocess.CompletedProcess:
    names = (
        "DATA",
        "GPUS",
        "NODES",
        "BATCH",
        "OUTPUT",
        "INIT",
        "CLASSES",
        "LABEL_MAP",
        "TEST_DATA",
        "TEACHER",
    )
    clean = {key: value for key, value in os.environ.items() if key not in names}
    env = {**clean, "PYTHON": "echo", **{key: str(value) for key, value in variables.items()}}
    command = ["bash", str(RECIPES / f"{recipe}.sh"), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def line_of(done: subprocess.CompletedProcess, title: str) -> list[str]:
    return shlex.split(
        next(line for line in done.stdout.splitlines() if line.startswith(title)).removeprefix(title)
    )


def test_every_recipe_is_in_the_table():
    found = {
        path.stem
        for pattern in ("postpretrain_*", "finetune_*", "distill_*")
        for path in RECIPES.glob(f"{pattern}.sh")
    }
    assert found == set(TABLE)


@pytest.mark.parametrize("gpus", [1, 32])
@pytest.mark.parametrize("name", TABLE)
def test_numbers(name, gpus, tmp_path, monkeypatch):
    batch, epochs, warmup, lr, layer_decay, drop_path, weight_decay, clip, classes, sampling, views = TABLE[
        name
    ]
    done = run(name, "--dry-run", cwd=tmp_path, GPUS=gpus)
    assert done.returncode == 0, done.stderr
    command = line_of(done, "command:")
    kind = "distil" if name.startswith("distill") else "finetune"
    args = build_parser(kind).parse_args(command[command.index(kind) :])
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    model = model_from_args(args)
    config, _ = configs_from_args(args, model, args.num_classes)
    assert (config.effective_batch, config.epochs, config.optim.warmup_epochs, config.optim.lr) == (
        batch,
        epochs,
        warmup,
        lr,
    )
    assert (config.layer_decay, model.drop_path_rate, config.optim.weight_decay) == (
        layer_decay,
        drop_path,
        weight_decay,
    )
    assert (config.optim.clip_grad, config.optim.betas, config.num_sample) == (clip, (0.9, 0.999), 2)
    assert (config.num_classes, config.clip.sampling) == (classes, sampling)
    assert (
        config.augment.flip == ("ssv2" not in name)
        and config.augment.mixup == 0.8
        and config.augment.smoothing == 0.1
    )
    assert model.embed_dim == SIZES[name.split("_vit")[-1][0]] and (model.num_frames, model.img_size) == (
        16,
        224,
    )
    assert (
        model.grid
        == ModelConfig.preset("vit_g" if "vitg" in name and "distill" not in name else "vit_b").grid
    )
    test = line_of(done, "test:")
    assert f"{test[test.index('--segments') + 1]} x {test[test.index('--crops') + 1]}" == views
    assert (
        "not verified here" in done.stdout
        and f"tested on {views} views" in done.stdout
        and "top-1" in done.stdout
    )


def test_what_a_person_sets(tmp_path):
    done = run(
        "finetune_vitg_k400",
        "--steps",
        "3",
        cwd=tmp_path,
        GPUS=1,
        DATA="list.txt",
        INIT="k710.pth",
        LABEL_MAP="m.json",
        CLASSES="names.txt",
        TEST_DATA="val.txt",
    )
    train, test = done.stdout.splitlines()[2:]
    assert (
        "--data list.txt --init k710.pth" in train
        and "--label-map m.json" in train
        and train.endswith("--steps 3")
    )
    assert "--classes names.txt" in train and "evaluate val.txt --checkpoint runs/finetune_vitg_k400" in test


def test_a_label_map_keeps_the_head_that_a_recipe_would_leave_out(tmp_path):
    for variables, new_head in (({}, True), ({"LABEL_MAP": "m.json"}, False)):
        command = line_of(run("finetune_vitg_ucf101", "--dry-run", cwd=tmp_path, **variables), "command:")
        args = build_parser("finetune").parse_args(command[command.index("finetune") :])
        assert args.settings.complete(args).new_head == new_head


@pytest.mark.parametrize(
    "recipe, variables, message",
    [
        ("finetune_vitb_k400", {}, "DATA is not set"),
        (
            "finetune_vitb_k400",
            {"DATA": "x"},
            "INIT is not set: set it to the checkpoint to start from (pre-training",
        ),
        ("distill_vitg_to_vitb", {"DATA": "x", "INIT": "y"}, "TEACHER is not set"),
        ("finetune_vitb_k400", {"GPUS": 7}, "do not divide the effective batch of 512"),
    ],
)
def test_what_is_missing_is_said(recipe, variables, message, tmp_path):
    done = run(recipe, cwd=tmp_path, **variables)
    assert done.returncode == 2 and message in done.stderr
