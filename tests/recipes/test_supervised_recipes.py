"""Recipes of supervised training: published numbers, written down here once more, on any number of GPUs."""

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from vmae.cli import build_parser
from vmae.train.finetune_settings import configs_from_args, model_from_args

RECIPES = Path(__file__).parents[2] / "recipes"
# Started by their launcher, on 1 and on 32 GPUs: one of each kind. test_published_numbers.py compares the
# numbers of all recipes with the released scripts.
LAUNCHED = ("postpretrain_vitg_k710", "finetune_vitb_ssv2", "distill_vitg_to_vits")


def run(recipe: str, *words: str, cwd: Path, **variables: object) -> subprocess.CompletedProcess:
    names = (
        "DATA",
        "GPUS",
        "NODES",
        "BATCH",
        "EFFECTIVE_BATCH",
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


def settings_of(words: list[str], gpus: int, monkeypatch):
    """(settings, settings of the run) of a command line of `finetune` or `distil`."""
    monkeypatch.setenv("WORLD_SIZE", str(gpus))
    kind = "distil" if "distil" in words else "finetune"
    args = build_parser(kind).parse_args(words[words.index(kind) :])
    args.settings.complete(args)
    return configs_from_args(args, model_from_args(args), args.num_classes)


@pytest.mark.parametrize("gpus", [1, 32])
@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_keeps_the_numbers_on_any_number_of_gpus(name, gpus, tmp_path, monkeypatch):
    done = run(name, "--dry-run", cwd=tmp_path, GPUS=gpus)
    assert done.returncode == 0, done.stderr
    config, settings = settings_of(line_of(done, "command:"), gpus, monkeypatch)
    kind = "distil" if name.startswith("distill") else "finetune"
    words = [
        kind,
        "--config",
        str(RECIPES / f"{name}.yaml"),
        "--data",
        "DATA",
        "--output",
        "y",
        "--init",
        "INIT",
    ]
    words += ["--teacher", "TEACHER"] if kind == "distil" else []
    alone, _ = settings_of(words, 1, monkeypatch)
    assert config == alone and settings.videos_per_step(gpus) == alone.effective_batch
    test, sparse = line_of(done, "test:"), "ssv2" in name
    views = f"{test[test.index('--segments') + 1]} x {test[test.index('--crops') + 1]}"
    assert views == ("2 x 3" if sparse else "5 x 3") and f"tested on {views} views" in done.stdout
    assert "not verified here" in done.stdout and "top-1" in done.stdout


@pytest.mark.parametrize("name", ["distill_vitg_to_vitb", "distill_vitg_to_vits"])
def test_numbers_of_distillation(name, monkeypatch):
    """Our choice: those of ViT-B's fine-tuning."""
    words = [
        "distil",
        "--config",
        str(RECIPES / f"{name}.yaml"),
        "--data",
        "x",
        "--output",
        "y",
        "--init",
        "z",
    ]
    config, _ = settings_of([*words, "--teacher", "g"], 1, monkeypatch)
    other = ["finetune", "--config", str(RECIPES / "postpretrain_vitb_k710.yaml"), *words[3:]]
    expected, _ = settings_of(other, 1, monkeypatch)
    fields = {field.name for field in dataclasses.fields(expected)} - {"model"}
    assert all(getattr(config, field) == getattr(expected, field) for field in fields)
    assert config.model.embed_dim == (768 if name.endswith("b") else 384) and config.num_classes == 710


def test_the_script_of_one_gpu_can_be_run_as_it_was_meant(tmp_path, monkeypatch):
    """vit_h_k600_ft.sh says 1 GPU x 4 videos."""
    done = run("finetune_vith_k600", "--dry-run", cwd=tmp_path, GPUS=1)
    assert "effective batch 4 videos" in done.stdout
    done = run("finetune_vith_k600", "--dry-run", cwd=tmp_path, GPUS=8, EFFECTIVE_BATCH=128)
    assert "effective learning rate 0.001 x 128 / 256 = 0.0005" in done.stdout
    _, settings = settings_of(line_of(done, "command:"), 8, monkeypatch)
    assert (settings.batch_size, settings.accumulate) == (4, 4)


def test_what_a_person_sets(tmp_path):
    done = run(
        "finetune_vitg_k400_after_k710",
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
    assert (
        "--classes names.txt" in train
        and "evaluate val.txt --checkpoint runs/finetune_vitg_k400_after_k710" in test
    )


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
        ("finetune_vitb_k400", {"EFFECTIVE_BATCH": "all"}, "EFFECTIVE_BATCH=all is not a number of videos"),
        ("finetune_vitg_k400", {"LABEL_MAP": "m.json"}, "recipes/finetune_vitg_k400_after_k710.sh"),
    ],
)
def test_what_is_missing_is_said(recipe, variables, message, tmp_path):
    done = run(recipe, cwd=tmp_path, **variables)
    assert done.returncode == 2 and message in done.stderr
