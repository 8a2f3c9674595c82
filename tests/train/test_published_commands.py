"""Command lines of the published programs: every flag, all 20 scripts of VideoMAE V2, VideoMAE V1's.

tests/data/published_scripts.json and published_scripts_v1.json hold the flags of the scripts,
published_flags.json those of the programs with their defaults; facts of OpenGVLab/VideoMAEv2 and
MCG-NJU/VideoMAE.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmae import InputError
from vmae.cli import COMMANDS, build_parser, main
from vmae.config import ModelConfig
from vmae.data.augment_classify import AugmentConfig, RandAugmentText
from vmae.data.data_sets import DATA_SETS
from vmae.train.published_flags import FINETUNE_FLAGS, PRETRAIN_FLAGS

ROOT = Path(__file__).parents[2]
FACTS = ROOT / "tests" / "data"
SCRIPTS = json.loads((FACTS / "published_scripts.json").read_text())
SCRIPTS_V1 = json.loads((FACTS / "published_scripts_v1.json").read_text())
FLAGS = json.loads((FACTS / "published_flags.json").read_text())
COMMAND_OF = {"run_mae_pretraining.py": "pretrain", "run_class_finetuning.py": "finetune"}
OTHERS = {"pretrain": PRETRAIN_FLAGS, "finetune": FINETUNE_FLAGS}


def flags_of(command: str) -> dict[str, argparse.Action]:
    return {
        flag: a for a in build_parser(command).commands.choices[command]._actions for flag in a.option_strings
    }


def parsed(words: str | list[str], command: str = "finetune") -> argparse.Namespace:
    words = words.split() if isinstance(words, str) else words
    args = build_parser(command).parse_args([command, "--data_path", "a", "--output_dir", "b", *words])
    return args.settings.complete(args)


# --- every flag


def published_flags():
    for program, facts in FLAGS.items():
        commands = [c for name, c in COMMAND_OF.items() if name in program] or list(OTHERS)
        for command in commands:
            for flag in (*facts["values"], *facts["switches"]):
                yield pytest.param(program, command, flag, id=f"{program[:2]} {command} {flag}")


@pytest.mark.parametrize(("program", "command", "flag"), list(published_flags()))
def test_every_published_flag_is_accepted(program, command, flag):
    """As a setting under its published name, or in the table; never in both; with as many words as there."""
    known = flags_of(command)
    in_table = [other for other in OTHERS[command] if other.name == flag]
    assert flag in known and (known[flag].dest == "others") == bool(in_table) and len(in_table) <= 1
    takes_words = flag in FLAGS[program]["values"]
    assert takes_words <= (known[flag].nargs != 0), f"{flag} takes a value"
    assert takes_words or known[flag].nargs in (0, "?"), f"{flag} takes none"
    for other in in_table:
        assert len(other.does) > 20 and "\n" not in other.does


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_is_short_for_another(command):
    parser = build_parser(command).commands.choices[command]
    assert not parser.allow_abbrev
    assert not build_parser(command).allow_abbrev


@pytest.mark.parametrize(
    "word", ["--mask", "--mix", "--drop_p", "--dropp=0.5", "--data", "--vers", "--decoder_mask"]
)
def test_what_looks_like_a_flag_is_refused_with_the_nearest(word, capsys):
    command = "pretrain" if "mask" in word else "finetune"
    if word == "--data":
        assert parsed(["--data", "x"]).data == "x"
        return
    assert main([command, "--data_path", "a", "--output_dir", "b", word, "0.5"]) == 2
    error = capsys.readouterr().err
    assert f"unrecognized arguments: {word}" in error and error.count("\n") == 1


def test_a_misspelt_flag_gets_the_nearest_name(capsys):
    for written, meant in (("--mask_ration", "--mask_ratio"), ("--no_pin_memory", "--no_pin_mem")):
        assert main(["pretrain", "--data_path", "a", "--output_dir", "b", written, "0.9"]) == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("command", OTHERS)
def test_help_leaves_flags_that_are_no_settings_out(command):
    text = build_parser(command).commands.choices[command].format_help()
    assert not [other.name for other in OTHERS[command] if f"{other.name} " in text]


def notes_of(capsys, words: str, command: str = "finetune") -> list[str]:
    """What a dry run without files says on stderr."""
    base = f"{command} --data_path YOUR_PATH/a --output_dir YOUR_PATH/b --dry-run {words}"
    assert main(base.split()) == 0
    return [line for line in capsys.readouterr().err.splitlines() if "placeholder" not in line]


@pytest.mark.parametrize(
    ("command", "other"), [(c, o) for c in OTHERS for o in OTHERS[c] if o.noted and not o.sets]
)
def test_a_flag_that_changes_nothing_says_why_once(command, other, capsys):
    words = f"{other.name} x {other.name} x" if other.words else f"{other.name} {other.name}"
    notes = [line for line in notes_of(capsys, words, command) if other.name in line]
    assert len(notes) == 1
    assert notes[0].startswith(f"note: {other.name} ") and "changes nothing here: " in notes[0]


def test_notes_are_said_by_one_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert notes_of(capsys, "--pin_mem") == []


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("pretrain", "--with_checkpoint", {"checkpointing": "full"}),
        ("finetune", "--use_checkpoint", {"checkpointing": "full"}),
        ("pretrain", "--normlize_target False", {"normalize_target": False}),
        ("pretrain", "--normlize_target=True", {"normalize_target": True}),
        ("finetune", "--zero_stage 3", {"parallel": "fsdp"}),
        ("finetune", "--zero_stage=2", {"parallel": "auto"}),
        ("finetune", "--model_ema", {"ema_decay": 0.9999, "ema": 0.9999}),
        ("finetune", "--model_ema --model_ema_decay 0.99", {"ema": 0.99}),
        ("finetune", "--save_ckpt_freq 7 --log_dir logs", {"save_every_epochs": 7, "log_dir": "logs"}),
        (
            "finetune",
            "--fname_tmpl {:06}.png --start_idx 0",
            {"frame_pattern": "{:06}.png", "first_frame": 0},
        ),
        ("pretrain", "--finetune start.pth", {"init": "start.pth"}),
        ("finetune", "--tubelet_size 1 --num_segments 1", {"tubelet_size": 1}),
        ("pretrain", "--mask_ratio=.8", {"encoder_ratio": 0.8}),
    ],
)
def test_flags_with_a_meaning_have_it(command, words, told):
    args = parsed(words, command)
    assert {name: getattr(args, name) for name in told if name != "ema_decay"} == {
        name: value for name, value in told.items() if name != "ema_decay"
    }


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--clip_grad None", "clip_grad", None),
        ("--clip-grad=None", "clip_grad", None),
        ("--pos-grid None", "pos_grid", None),
        ("--opt_betas None", "betas", (0.9, 0.999)),
        ("--opt_betas 0.8 0.9", "betas", [0.8, 0.9]),
        ("--opt_eps None", "eps", 1e-8),
        ("--warmup_steps -1", "warmup_steps", None),
        ("--nb_classes -1", "num_classes", None),
        ("--finetune=", "init", None),
        ("--data_root=", "data_root", None),
        ("--log_dir=", "log_dir", None),
        ("--resume=", "resume", "auto"),
        ("--auto_resume --resume=old", "resume", "old"),
        ("--resume=old --auto_resume", "resume", "old"),
        ("--resume=old --no_auto_resume", "resume", "old"),
        ("--no_auto_resume", "resume", None),
    ],
)
def test_published_defaults_may_be_written_out(words, name, value):
    args = parsed(words)
    assert getattr(args, name) == value
    assert args.given.get(name, value) == value


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--with_checkpoint --checkpointing none",
            "--with_checkpoint stands for --checkpointing full, but none",
        ),
        ("--zero_stage 3 --parallel ddp", "--zero_stage stands for --parallel fsdp, but ddp is given too"),
        ("--zero_stage 4", "--zero_stage must be 0, 1, 2 or 3, not '4'"),
        ("--num_segments 2", "--num_segments 2: the published loader cuts one clip"),
        ("--opt_betas 0.9", "expected 2 numbers, not 1"),
        ("--opt_betas 0.9 0.99 0.999", "expected 2 numbers, not 3"),
        ("--lr None", "--lr: must be a number above 0 and at most 10,000, not None"),
        ("--data_set Kinetics-400 --nb_classes 174", "--data_set Kinetics-400 has 400 classes, but"),
        ("--data_set k400", "unknown data set 'k400'; known: Kinetics-400, Kinetics-600"),
        ("--data_set image_folder", "unknown data set 'image_folder'; known: Kinetics-400"),
        ("--output_dir=", "--output/--output_dir is empty"),
        ("--data_path=", "--data/--data_path is empty"),
        ("--opt lamb", "unknown optimizer 'lamb'"),
    ],
)
def test_wrong_words_are_one_line(words, told, capsys):
    assert main(f"finetune --data_path YOUR_PATH/a --output_dir YOUR_PATH/b --dry-run {words}".split()) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and error.startswith("error: ")


def test_published_flags_are_keys_of_a_file(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(
        "data_path: YOUR_PATH/a\noutput_dir: YOUR_PATH/b\nmodel: vit_base_patch16_224\ndata_set: SSV2\n"
        "with_checkpoint: true\nuse_checkpoint: false\nno_pin_mem: true\nlocal_rank: 0\nzero_stage: 3\n"
        "opt_betas: None\nnb_classes: -1\nfinetune: ''\n"
    )
    assert main(["finetune", "--config", str(path), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["run"]["speed"]["checkpointing"] == "full" and shown["run"]["speed"]["parallel"] == "fsdp"
    assert shown["results"]["num_classes"] == 174 and shown["results"]["optim"]["betas"] == [0.9, 0.999]
    assert err.count("--no_pin_mem changes nothing") == 1 and err.count("--local_rank 0 changes nothing") == 1
    for text, told in (
        ("no_pin_mem: 3", "no_pin_mem must be true or false, not 3"),
        ("local_rank: {a: 1}", "local_rank must be text or a number"),
        ("with_checkpoint: true\ncheckpointing: none", "--with_checkpoint stands for --checkpointing full"),
        ("no_pin_memory: true", "did you mean no_pin_mem?"),
    ):
        path.write_text(text)
        assert main(["finetune", "--config", str(path), "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert told in error and str(path) in error and error.count("\n") == 1


def test_ranks_come_from_open_mpi_where_that_is_asked_for(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("RANK", "3"), ("SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    parsed("--pin_mem")
    assert "RANK" not in os.environ
    with monkeypatch.context() as inner:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            inner.setenv(name, "x")
            inner.delenv(name)
        parsed("--dist_on_itp")
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]


def test_the_table_of_flags_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import write_flags

    text = write_flags.PAGE.read_text(encoding="utf-8")
    assert text == write_flags.page(), "run `python docs/write_flags.py`"
    missing = {line.split("`")[1] for line in text.splitlines() if line.endswith("| not accepted yet |")}
    assert not missing


# --- the scripts

WHERE = {  # flag of a script: where its number stands
    "data_path": "results.data",
    "mask_type": "results.mask.encoder",
    "mask_ratio": "results.mask.encoder_ratio",
    "decoder_mask_type": "results.mask.decoder",
    "decoder_mask_ratio": "results.mask.decoder_ratio",
    "decoder_depth": "results.model.decoder_depth",
    "batch_size": "run.batch_size",
    "num_sample": "results.num_sample",
    "num_frames": "results.model.num_frames",
    "input_size": "results.model.img_size",
    "num_workers": "run.speed.num_workers",
    "lr": "results.optim.lr",
    "min_lr": "results.optim.min_lr",
    "opt_betas": "results.optim.betas",
    "weight_decay": "results.optim.weight_decay",
    "clip_grad": "results.optim.clip_grad",
    "layer_decay": "results.layer_decay",
    "warmup_lr": "results.optim.warmup_lr",
    "test_num_segment": "results.segments",
    "test_num_crop": "results.crops",
    "short_side_size": "results.clip.short_side",
    "drop_path": "results.model.drop_path_rate",
    "head_drop_rate": "results.head_drop_rate",
    "fc_drop_rate": "results.head_drop_rate",
    "warmup_epochs": "results.optim.warmup_epochs",
    "epochs": "results.epochs",
    "save_ckpt_freq": "run.save_every_epochs",
    "log_dir": "run.log_dir",
    "output_dir": "run.output",
    "finetune": "results.init",
    "nb_classes": "results.num_classes",
    "fname_tmpl": "results.frame_pattern",
    "start_idx": "results.first_frame",
}
DEFAULTS = {  # of the programs, where a script is silent
    "pretrain": {"lr": 1.5e-4, "min_lr": 1e-5, "weight_decay": 0.05, "warmup_epochs": 40, "num_sample": 1},
    "finetune": {
        **{"min_lr": 1e-6, "weight_decay": 0.05, "layer_decay": 0.75, "drop_path": 0.1, "head_drop_rate": 0},
        **{"warmup_epochs": 5, "num_sample": 2, "clip_grad": None, "nb_classes": 400},
    },
}
MEANINGS = {"run_cell": "running_cell"}


def look_up(shown: dict, place: str):
    for part in place.split("."):
        shown = shown[part]
    return shown


def words_of(flags: dict) -> list[str]:
    """A script's command line."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", *value.split()]
    return words


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("name", [*SCRIPTS, *SCRIPTS_V1])
def test_a_published_script_passes_a_dry_run(name, ranks, monkeypatch, capsys):
    """As it stands, its placeholders in place: every number of it is in the resolved settings."""
    script = SCRIPTS.get(name) or SCRIPTS_V1[name]
    command, flags = COMMAND_OF[script["program"]], script["flags"]
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert main([command, *words_of(flags), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    results, run, derived = shown["results"], shown["run"], shown["derived"]
    silent = {
        name: value for name, value in DEFAULTS[command].items() if WHERE[name] not in map(WHERE.get, flags)
    }
    for flag, wanted in {**silent, **flags}.items():
        if flag in WHERE:
            found = look_up(shown, WHERE[flag])
            if isinstance(wanted, str) and not isinstance(found, str):
                numbers = [float(word) for word in wanted.split()]
                wanted = numbers if isinstance(found, list) else numbers[0]
            if flag == "nb_classes" and "data_set" in flags:
                wanted = DATA_SETS[flags["data_set"]].num_classes
            assert found == MEANINGS.get(wanted, wanted) if isinstance(wanted, str) else found == wanted, flag
    preset = ModelConfig.preset(
        {"small": "vit_s", "base": "vit_b", "large": "vit_l", "huge": "vit_h", "giant": "vit_g"}[
            flags["model"].split("_patch")[0].split("_")[-1]
        ]
    )
    for field in ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio", "decoder_embed_dim"):
        assert results["model"][field] == getattr(preset, field)
    batch = int(flags["batch_size"]) * ranks
    assert derived["effective_batch_videos"] == batch == results["effective_batch"]
    assert derived["peak_lr"] == pytest.approx(results["optim"]["lr"] * batch / 256)
    assert derived["clips_per_step"] == batch * results["num_sample"]
    full = "with_checkpoint" in flags or "use_checkpoint" in flags
    assert run["speed"]["checkpointing"] == ("full" if full else "none")
    if command == "pretrain":
        assert results["stride"] == int(flags["sampling_rate"])
        dual = "decoder_mask_type" in flags
        assert (results["mask"]["decoder"] == "none") != dual
        assert ("note: encoder-only masking" in err) != dual
    else:
        sparse = flags.get("data_set") == "SSV2"
        assert results["clip"]["sampling"] == ("sparse" if sparse else "dense")
        assert results["augment"]["flip"] != sparse
        assert sparse or results["clip"]["stride"] == int(flags["sampling_rate"])
        assert {"smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "erase": 0.25}.items() <= results[
            "augment"
        ].items()
        assert (results["augment"]["operations"], results["augment"]["magnitude"]) == (4, 7)
        assert err.count("--enable_deepspeed changes nothing here: ") == 1
    assert results["optim"]["eps"] == 1e-8 and results["seed"] == 0
    assert f"--data {flags['data_path']} is a placeholder: not checked" in err


EXPLAINED = {  # defaults of the programs that differ here, and why
    "pretrain": {
        "--epochs": "300 in V2, 800 in V1 and here; scripts say it",
        "--mask_ratio": "0.9 in V2 and here, 0.75 in V1; scripts say it",
        "--decoder_mask_type": "none without a ratio, as there",
        "--decoder_mask_ratio": "none without a ratio, as there",
        "--warmup_lr": "read nowhere in the schedule there",
    },
    "finetune": {
        "--test_num_segment": "10 in V2, 5 in V1 and here; scripts say it",
        "--warmup_lr": "as above",
        "--aa": "the same numbers, in settings of their own",
        "--short_side_size": "the side of the clips, 224",
    },
}
EXPLAINED["pretrain"] |= (
    both := {
        "--save_ckpt_freq": "checkpoints come every 1000 steps here",
        "--num_workers": "1 here; no result changes",
        "--device": "auto here: a GPU where there is one",
        "--output_dir": "must be given here",
        "--model_ema_decay": "no average without --model_ema",
        "--data_set": "the list decides here, see test_the_class_count_without_a_data_set",
        "--nb_classes": "the same",
        "--opt_betas": "None there is the optimizer's own, and (0.9, 0.95) in all scripts of pre-training",
        "--resume": "auto_resume is on there, and here",
    }
)
EXPLAINED["finetune"] |= both
KEYS_DIFFER = {"--model": None, "--data_path": None}


@pytest.mark.parametrize("program", [program for program in FLAGS if program.endswith(".py")])
def test_published_defaults_are_the_defaults_of_a_published_command_line(program):
    """Each default of the program equals ours for a command line in published words, or is explained."""
    command = COMMAND_OF[program.split()[1]]
    args = parsed(["--model", FLAGS[program]["values"]["--model"]], command)
    table, known = {other.name for other in OTHERS[command]}, flags_of(command)
    for flag, default in FLAGS[program]["values"].items():
        if flag in table or flag in KEYS_DIFFER or flag not in known:
            continue
        ours = getattr(args, known[flag].dest)
        if flag == "--aa":  # not given, its numbers are the fields' defaults
            ours = RandAugmentText.example
            assert RandAugmentText.settings(ours) == {
                name: getattr(AugmentConfig(), name) for name in RandAugmentText.settings(ours)
            }
        if flag in EXPLAINED[command]:
            continue
        same = ours == default or (default in ("", None, -1) and ours is None)
        assert same or (
            ours is None
            and flag
            in (
                "--input_size",
                "--num_frames",
                "--tubelet_size",
                "--decoder_depth",
                "--short_side_size",
                "--test_num_segment",
                "--test_num_crop",
                "--clip_grad",
                "--warmup_steps",
            )
        ), (flag, ours, default)
    model = ModelConfig()
    assert (model.img_size, model.num_frames, model.tubelet_size, model.decoder_depth) == (224, 16, 2, 4)


# --- masking: VideoMAE V1's scripts name no decoder mask


@pytest.mark.parametrize(
    ("words", "decoder", "ratio", "told"),
    [
        ("", "running_cell", 0.5, None),
        ("--mask_type tube --mask_ratio 0.9", "none", 0.5, "encoder-only masking: published names"),
        ("--model pretrain_videomae_base_patch16_224", "none", 0.5, "encoder-only masking: published names"),
        (
            "--mask_ratio=0.9 --decoder_mask_type run_cell",
            "running_cell",
            0.5,
            "dual masking: running_cell 0.5",
        ),
        (
            "--mask_ratio 0.9 --decoder_mask_type run_cell --decoder_mask_ratio 0.0",
            "none",
            0.0,
            "encoder-only",
        ),
        ("--mask_ratio 0.9 --decoder_mask_ratio 0.25", "running_cell", 0.25, None),
        ("--mask_ratio 0.9 --decoder-mask random", "random", 0.5, "dual masking: random 0.5"),
        ("--encoder-mask tube", "running_cell", 0.5, None),  # the run names its masks as it starts
        ("--encoder-ratio 0.8 --decoder-ratio 0", "running_cell", 0.0, None),
    ],
)
def test_which_masking_a_command_line_means(words, decoder, ratio, told):
    args = parsed(words, "pretrain")
    assert (args.decoder_mask, args.decoder_ratio) == (decoder, ratio)
    notes = [note for note in args.notes if "masking" in note]
    assert notes == [] if told is None else (len(notes) == 1 and told in notes[0])


def test_a_settings_file_of_ours_keeps_dual_masking(tmp_path):
    (tmp_path / "own.yaml").write_text("model: vit_b\nepochs: 50\n")
    args = parsed(f"--config {tmp_path / 'own.yaml'} --mask_ratio 0.8", "pretrain")
    assert args.decoder_mask == "running_cell" and args.batch_size == 32
    (tmp_path / "own.yaml").write_text("mask_type: tube\nmask_ratio: 0.9\nepochs: 50\n")
    args = parsed(f"--config {tmp_path / 'own.yaml'}", "pretrain")
    assert (args.decoder_mask, args.batch_size, args.warmup_epochs) == ("none", 64, 40)


def test_warm_up_where_a_script_is_silent():
    assert parsed("--data_set SSV2 --epochs 20").given["warmup_epochs"] == 5
    assert "warmup_epochs" not in parsed("--epochs 20").given  # ours: a sixth of a short run
    assert "warmup_epochs" not in parsed("--data_set SSV2 --epochs 5").given  # an error there
    assert parsed("--data_set SSV2 --epochs 20 --warmup_epochs 1").given["warmup_epochs"] == 1
    assert "warmup_epochs" not in parsed("--data_set SSV2 --epochs 20 --warmup_steps 9").given


# --- data sets, with real lists


@pytest.fixture
def tiny(labelled_world, tmp_path, monkeypatch):
    """`tiny(command, words)`: run a command line on folders of frames with a micro model; its exit code."""
    from vmae.config import PRESETS

    micro = dict(embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2)
    monkeypatch.setitem(PRESETS, "vit_b", micro | {"decoder_depth": 1})
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lists"
    folder.mkdir()
    rows = [(labelled_world / f"v{video:02}", video % 4) for video in range(8)]
    for name in ("train", "val", "test"):
        (folder / f"{name}.csv").write_text("".join(f"{path} 10 {label}\n" for path, label in rows))
    (folder / "pretrain.csv").write_text("".join(f"{path} 1 10 0\n" for path, _ in rows))
    sizes = "--input_size 32 --num_frames 8 --batch_size 2 --num_workers 0 --device cpu --patch-size 8"

    def start(command, words):
        data = folder if command == "finetune" else folder / "pretrain.csv"
        return main([command, "--data_path", str(data), *sizes.split(), *words.split()])

    start.folder = folder
    return start


def test_the_class_count_without_a_data_set(tiny, capsys):
    """The list decides; a line says what the published program takes."""
    words = "--model vit_base_patch16_224 --output_dir run --dry-run --epochs 6"
    assert tiny("finetune", words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"]["num_classes"] == 4
    assert (
        "note: 4 classes, the list's largest label + 1; the published program takes Kinetics-400 and 400"
        in err
    )
    assert tiny("finetune", f"{words} --data_set HMDB51") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["results"]["num_classes"] == 51 and "largest label" not in err


def test_labels_beyond_a_data_set_are_refused(tiny, capsys):
    (tiny.folder / "train.csv").write_text("v.mp4 51\n")
    assert tiny("finetune", "--data_set HMDB51 --output_dir run") == 2
    assert "label 51 is out of range; labels are 0 to 50 (51 classes)" in capsys.readouterr().err


@pytest.mark.parametrize("name", DATA_SETS)
def test_what_a_data_set_decides(name):
    args = parsed(f"--data_set {name}")
    own = DATA_SETS[name]
    assert args.num_classes == own.num_classes
    assert args.sampling == ("sparse" if name == "SSV2" else "dense") and args.flip == (name != "SSV2")
    assert parsed(f"--data_set {name} --flip --sampling dense").flip
    assert parsed(f"--data_set {name} --nb_classes {own.num_classes}").num_classes == own.num_classes
    assert parsed(f"--data_set {name} --augment none").given.get("flip", False) is False


def test_frames_are_named_as_the_flags_say(tiny, labelled_world, tmp_path, capsys):
    from vmae.data.labels import read_labelled_list

    folder = tmp_path / "SomethingV2" / "1"
    folder.mkdir(parents=True)
    for number, image in enumerate(sorted((labelled_world / "v00").iterdir())):
        (folder / f"f_{number:03}.jpg").symlink_to(image)
    (tiny.folder / "train.csv").write_text(f"{folder},10,3\n" * 2)
    for name in ("val.csv", "test.csv"):
        (tiny.folder / name).write_text(f"{folder},10,3\n")
    words = "--data_set SSV2 --output_dir run --dry-run --fname_tmpl f_{:03}.jpg"
    assert tiny("finetune", f"{words} --start_idx 0") == 0
    assert tiny("finetune", f"{words} --start_idx 1") == 0  # frame 10 is looked for when it is read
    assert tiny("finetune", f"{words} --start_idx 10") == 2
    assert "f_010.jpg' does not exist" in capsys.readouterr().err
    found = read_labelled_list(tiny.folder / "train.csv", frame_pattern="f_{:03}.jpg", first_frame=0)
    assert found.entries[0].frame_path(9).endswith("f_009.jpg") and found.labels[0] == (3,)


def test_a_head_of_other_classes_starts_anew_where_a_data_set_is_named(tiny, tmp_path, capsys):
    from vmae.config import PRESETS
    from vmae.model import build_classifier

    model = build_classifier(ModelConfig(**PRESETS["vit_b"], img_size=32, patch_size=8, num_frames=8), 7)
    torch.save({"module": model.state_dict()}, tmp_path / "old.pth")
    words = "--model vit_base_patch16_224 --output_dir run --finetune old.pth --dry-run"
    words += " --init-size 32 --init-frames 8"
    assert tiny("finetune", f"{words} --data_set UCF101 --epochs 6") == 0
    out, err = capsys.readouterr()
    assert "note: old.pth has a head of 7 classes, UCF101 has 101: the head starts anew, as in" in err
    assert json.loads(out)["results"]["new_head"] is True
    assert tiny("finetune", f"{words} --epochs 6") == 2
    assert "--new-head starts a fresh one" in capsys.readouterr().err


# --- dry runs whose files are not there


def test_a_dry_run_shows_settings_before_what_is_missing(tmp_path, capsys):
    words = f"finetune --data_path {tmp_path}/gone --finetune {tmp_path}/gone.pth --output_dir {tmp_path}/run"
    assert main([*words.split(), "--dry-run", "--model", "vit_base_patch16_224", "--lr", "3e-3"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["results"]["optim"]["lr"] == 3e-3
    assert f"error: --data {tmp_path}/gone does not exist" in err
    assert f"error: --init {tmp_path}/gone.pth does not exist" in err
    assert (
        main(f"finetune --data {tmp_path} --output {tmp_path}/run --dry-run".split()) == 2
    )  # no train.csv in it
    out, err = capsys.readouterr()
    assert json.loads(out)["results"]["num_classes"] is None and "holds no train.csv" in err
    assert main(f"pretrain --data {tmp_path}/gone --output {tmp_path}/run --dry-run".split()) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["results"]["epochs"] == 800 and "error: --data" in err
    (tmp_path / "empty.txt").write_text("gone.mp4\n")
    assert main(f"pretrain --data {tmp_path}/empty.txt --output {tmp_path}/run --dry-run".split()) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["results"]["epochs"] == 800 and "'gone.mp4' does not exist" in err
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_placeholder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("v.mp4 0\n")
    for words in ("pretrain --data_path YOUR_PATH/a.csv --output_dir run",
                  "finetune --data_path list.txt --output_dir YOUR_PATH/run",
                  "finetune --data_path list.txt --output_dir run --log_dir /x/YOUR_PATH/logs"):  # fmt: skip
        assert main(words.split()) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "YOUR_PATH stands for a folder of yours; put your path in its place" in error
    assert not (tmp_path / "YOUR_PATH").exists()
    (tmp_path / "YOUR_PATH").mkdir()  # someone's folder is called so
    assert main("pretrain --data_path YOUR_PATH/a.csv --output_dir run".split()) == 2
    assert "list file 'YOUR_PATH/a.csv' does not exist" in capsys.readouterr().err


def test_hub_names_and_addresses_are_not_looked_for_on_the_disk(tmp_path, capsys):
    words = f"finetune --data_path YOUR_PATH/a --output_dir {tmp_path}/run --dry-run --finetune hub:a/b.pth"
    assert main(words.split()) == 0
    assert "hub:a/b.pth" in capsys.readouterr().out


# --- checkpoints and logs


def test_checkpoints_every_so_many_epochs_and_logs_elsewhere(tiny, tmp_path, capsys):
    words = "--model pretrain_videomae_base_patch16_224 --mask_ratio 0.75 --output_dir run --warmup_epochs 1"
    assert tiny("pretrain", f"{words} --epochs 3 --save_ckpt_freq 2 --log_dir logs --sampling_rate 1") == 0
    assert "tensorboard --logdir logs" in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == [
        "checkpoint-00000008",
        "checkpoint-00000012",
    ]
    assert list((tmp_path / "logs").iterdir()) and not (tmp_path / "run" / "tensorboard").exists()


def test_the_last_of_two_ways_to_say_how_often_counts(tmp_path):
    (tmp_path / "own.yaml").write_text("save_every: 5\n")
    args = parsed(f"--config {tmp_path / 'own.yaml'} --save_ckpt_freq 2")
    assert args.save_every_epochs == 2 and "save_every" not in args.given
    (tmp_path / "own.yaml").write_text("save_ckpt_freq: 5\n")
    args = parsed(f"--config {tmp_path / 'own.yaml'} --save-every 2")
    assert args.save_every == 2 and args.save_every_epochs is None


# --- in processes of their own


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_script_runs_as_a_process(command, tiny, tmp_path):
    """A published command line with real lists; `finetune` under a launcher with 2 ranks."""
    name = "vit_b_hybrid_pt" if command == "pretrain" else "vit_b_ssv2_ft"
    flags = {**SCRIPTS[name]["flags"], "data_path": str(tiny.folder / "pretrain.csv"), "output_dir": "run",
             "log_dir": "run", "batch_size": "2", "num_workers": "0"}  # fmt: skip
    launcher = []
    if command == "finetune":
        flags |= {"data_path": str(tiny.folder)}
        flags.pop("finetune")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [
        sys.executable,
        *launcher,
        "-m",
        "vmae",
        command,
        *words_of(flags),
        "--device",
        "cpu",
        "--dry-run",
    ]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout[done.stdout.index("{") :])
    ranks = 2 if launcher else 1
    assert shown["derived"]["ranks"] == ranks and shown["derived"]["effective_batch_videos"] == 2 * ranks
    assert shown["results"]["steps"] == (8 // 2 if command == "pretrain" else 8 // 4) * int(flags["epochs"])
    if command == "finetune":
        assert done.stderr.count("--enable_deepspeed changes nothing") == 1


def test_input_errors_have_one_kind():
    with pytest.raises(InputError, match="unrecognized"):
        build_parser("pretrain").parse_args(["pretrain", "--mask", "0.9"])
