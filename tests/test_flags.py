"""Flags, settings files and `config.yaml`, made from fields: layers, names, errors, all flags there were."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmae import InputError
from vmae.cli import COMMANDS, SETTINGS, build_parser, main
from vmae.config import PRESETS, ModelConfig, SpeedConfig, _Checked
from vmae.files.yaml_files import write_settings
from vmae.flags import Settings, add_settings, chosen
from vmae.settings import SHARE, Whole, about_field, setting
from vmae.train import detection_settings, finetune_settings
from vmae.train.distil_settings import DistilConfig
from vmae.train.metrics import read_log
from vmae.train.pretrain_settings import RunConfig, TrainingConfig, configs_from_args

ROOT = Path(__file__).parents[1]
BEFORE = json.loads((ROOT / "tests" / "data" / "flags.json").read_text())
NEEDED = ["--data", "list.txt", "--output", "run"]


def parsed(*words: str, command: str = "pretrain") -> argparse.Namespace:
    args = build_parser(command).parse_args([command, *map(str, words)])
    return args.settings.complete(args)


def flags_of(command: str) -> dict[str, argparse.Action]:
    subparsers = next(a for a in build_parser(command)._actions if isinstance(a, argparse._SubParsersAction))
    return {flag: action for action in subparsers.choices[command]._actions for flag in action.option_strings}


def configs(*words: str):
    return configs_from_args(parsed(*NEEDED, *words))


# --- every flag of the commands as they were before flags were made from fields


@pytest.mark.parametrize("command", BEFORE)
def test_every_flag_there_was_is_accepted(command):
    now = flags_of(command)
    for kind, takes_value in (("with a value", True), ("alone", False)):
        for flag in BEFORE[command][kind].split():
            assert flag in now, f"{command} {flag} is gone"
            assert (now[flag].nargs != 0) == takes_value, f"{command} {flag}"


def test_published_names_mean_what_they_did():
    args = parsed(*"--data_path a --output_dir b --auto_resume --mask_ratio 0.8 --num_workers 3".split())
    assert (args.data, args.output, args.resume) == ("a", "b", "auto")
    assert (args.encoder_ratio, args.workers) == (0.8, 3)
    assert parsed(*NEEDED, "--no_auto_resume").resume is None
    assert parsed(*NEEDED, "--sparse_sample", command="finetune").sampling == "sparse"
    assert parsed(*NEEDED, "--model", "vit_giant_patch14_224", command="finetune").model == "vit_g"
    assert configs("--decoder_mask_type", "run_cell")[0].mask.decoder == "running_cell"


# --- layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(_Checked):
    size: int = setting(4, "of it", Whole(1, 9))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(_Checked):
    inner: Inner
    share: float = setting(0.5, "of all", SHARE, aliases=("--part",), overrules=("count",))
    count: int | None = setting(None, "instead of --share", Whole(1, 9), unset="the share's")
    label: str = setting(help="what it is called")
    untold: int = 3


def complete(tmp_path, words: str, text: str | None = None) -> argparse.Namespace:
    settings, parser = Settings(Outer, defaults={"size": 5}), argparse.ArgumentParser()
    settings.add_to(parser)
    parser.add_argument("--config")
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
        words += f" --config {tmp_path / 'own.yaml'}"
    return settings.complete(parser.parse_args(words.split()))


def test_layers(tmp_path):
    args = complete(tmp_path, "--label x")
    assert args.given == {"size": 5, "label": "x"} and (args.share, args.count) == (0.5, None)
    args = complete(tmp_path, "--size 7", "label: y\nsize: 6\npart: 1e-1\n")
    assert args.given == {"size": 7, "label": "y", "share": 0.1}
    assert chosen(Outer, args) == {"label": "y", "share": 0.1} and chosen(Inner, args) == {"size": 7}
    assert complete(tmp_path, "--share 1", "label: y\ncount: 3\n").count is None  # a flag over a file
    assert complete(tmp_path, "", "label: y\ncount: 3\nshare: 1\n").count == 3  # the same layer


def test_a_setting_touches_one_place(tmp_path):
    """A new field is flag, key, help, check and part of `config.yaml`."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wider(Inner):
        width: float = setting(2.0, "of the new thing", SHARE)

    settings, parser = Settings(Wider), argparse.ArgumentParser()
    settings.add_to(parser)
    assert "--width WIDTH" in parser.format_help() and "of the new thing (2)" in parser.format_help()
    args = settings.complete(parser.parse_args(["--width", "0.5"], argparse.Namespace(config=None)))
    assert settings.resolved(args, Wider(**chosen(Wider, args))) == {"size": 4, "width": 0.5}
    with pytest.raises(InputError, match="width must be a number at least 0 and at most 1, not 2"):
        Wider()
    add_settings(parser, Inner, "size", name="other", unset="as before")
    assert parser.parse_args([]).other is None and "of it (as before)" in parser.format_help()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: 2e-3", 2e-3),
        ("lr: 0.002", 2e-3),
        ("betas: [0.9, 1e-1]", (0.9, 0.1)),
        ("opt_betas: [0.5, 0.5]", (0.5, 0.5)),
        ("image_size: 224x320", (224, 320)),
        ("input-size: [64, 32]", (64, 32)),
        ("mask_type: frame", "frame"),
        ("decoder_mask: run_cell", "running_cell"),
        ("model: pretrain_videomae_small_patch16_224", "vit_s"),
        ("clip_grad: null", None),
        ("compile: true", True),
    ],
)
def test_values_of_a_file(tmp_path, text, told):
    (tmp_path / "own.yaml").write_text(text)
    found = parsed(*NEEDED).settings.read(tmp_path / "own.yaml")
    assert list(found.values()) == [told] and type(*found.values()) is type(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lrr: 1", "unknown setting 'lrr'; did you mean lr?"),
        ("zzz: 1", "unknown setting 'zzz'; keys are names of flags"),
        ("lr: fast", "lr must be a number above 0 and at most 10,000, not 'fast'"),
        ("lr: .nan", "lr must be a number above 0"),
        ("lr: null", "lr must be a number above 0"),
        ("seed: -1", "seed must be a whole number from 0 to"),
        ("seed: true", "seed must be a whole number from 0 to"),
        ("betas: 0.9", "betas must be 2 numbers, not 0.9"),
        ("betas: [0.9, 2]", "betas must be a number at least 0 and below 1, not 2"),
        ("flip: 'no, never'", "flip must be true or false, not 'no, never'"),
        ("data_root: 3", "data_root must be text, not 3"),
        ("dtype: int8", "unknown dtype 'int8'; known: float32, bfloat16"),
        ("lr: 1\nlr: 2", "lr is set twice"),
        ("betas: [0.5, 0.5]\nopt_betas: [0.5, 0.5]", "betas is set twice"),
        ("- lr", "expected `key: value` a line"),
        ("lr: [", "is no YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, told, capsys):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["pretrain", *NEEDED, "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(path) in error and told in error and error.count("\n") == 1


def test_what_has_to_be_given_may_stand_in_the_file(tmp_path, capsys):
    assert main(["pretrain", "--data", "x"]) == 2
    assert "required: --output/--output_dir (or output in --config)" in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text("data: x\noutput: y\n")
    assert parsed("--config", tmp_path / "own.yaml").output == "y"


def test_a_flag_overrules_what_a_file_says_in_other_words(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "steps: 7\nwarmup_steps: 3\neffective_batch: 64\nbatch_size: 4\n"
        "embed_dim: 48\nnum_heads: 4\nnum_frames: 8\n"
    )
    file = ("--config", tmp_path / "own.yaml")
    config, run = configs(*file)
    assert (config.steps, config.warmup_steps, config.effective_batch, run.accumulate) == (7, 3, 64, 16)
    assert (config.model.embed_dim, config.model.num_frames) == (48, 8)
    config, run = configs(*file, *"--epochs 9 --warmup-epochs 2 --batch-size 8".split())
    assert (config.steps, config.epochs, config.warmup_steps) == (None, 9, None)
    assert (config.optim.warmup_epochs, run.accumulate) == (2, 8)
    config, run = configs(*file, *"--accumulate 2 --model vit_s".split())
    assert (config.effective_batch, config.model.embed_dim, config.model.num_frames) == (8, 384, 8)


def test_an_effective_batch_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="batch of 64 videos is no multiple of batch size 24 x 1 ranks"):
        configs("--effective-batch", "64", "--batch-size", "24")


def test_any_architecture_can_be_written_down():
    """Every field of the model is a setting."""
    keys = parsed(*NEEDED).settings.keys.values()
    assert {field.name for field in dataclasses.fields(ModelConfig)} <= {key.field.name for key in keys}
    words = "--embed-dim 96 --depth 3 --num-heads 3 --mlp-ratio 2 --no-qkv-bias --cos-attn --pos-grid 4 7 7"
    model = configs(*words.split())[0].model
    assert model == ModelConfig(
        embed_dim=96, depth=3, num_heads=3, mlp_ratio=2, qkv_bias=False, cos_attn=True, pos_grid=(4, 7, 7)
    )
    assert {key for preset in PRESETS.values() for key in preset} <= {key.name for key in keys}


# --- `config.yaml`


def test_a_run_is_repeated_from_its_settings(tmp_path, videos, capsys):
    """Bit by bit, by the file alone; on top of it flags."""
    words = """--model vit_tiny --depth 1 --image-size 32 --patch-size 8 --num-frames 8 --stride 1
        --batch-size 1 --accumulate 2 --epochs 1 --repeat 2 --lr 0.1 --drop-path 0.2 --device cpu
        --workers 0 --log-every 1 --no-tensorboard --seed 5"""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["pretrain", "--data", str(videos), "--output", str(first), *words.split()]) == 0
    file = str(first / "config.yaml")
    capsys.readouterr()
    assert main(["pretrain", "--config", file]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["pretrain", "--config", file, "--output", str(second)]) == 0
    losses = [[record["loss"] for record in read_log(folder / "log.jsonl")] for folder in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    text = (first / "config.yaml").read_text()
    assert "effective_batch: 2" in text and "accumulate" not in text and "\ndepth: 1\n" in text
    assert (second / "config.yaml").read_text() == text.replace(str(first), str(second))


SUPERVISED = """--output out --init old.pth --model vit_tiny --image-size 32x48 --patch-size 8 --num-frames 8
    --epochs 7 --drop-path 0.3 --layer-scale 0.1 --lr 0.02 --betas 0.8 0.9 --batch-size 2 --accumulate 3
    --seed 4 --no-flip --init-frames 8 --no-resume --workers 0 --clip-grad 1 --stride 2 --save-every 7"""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("finetune", "--data list.txt --augment none --mixup 0.3 --sparse_sample --ema 0.9 --head-drop 0.5"),
        (
            "finetune-detection",
            "--annotations a --videos v --actions l --min-crop 0.5 --origin 900 --new-head",
        ),
        (
            "distil",
            "--data list.txt --num-classes 3 --teacher t --temperature 3 --kl-weight 1 --probe linear",
        ),
    ],
)
def test_settings_files_of_supervised_training_say_all(tmp_path, command, words):
    def made(*words):
        args = parsed(*words, command=command)
        model = finetune_settings.model_from_args(args, None)
        if command == "finetune-detection":
            return args, detection_settings.configs_from_args(args, model, {1: "stand"})
        own, run = finetune_settings.configs_from_args(args, model, 3)
        if command == "distil":
            values = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
            own = DistilConfig(**{**chosen(DistilConfig, args), **values})
        return args, (own, run)

    args, (config, run) = made(*SUPERVISED.split(), *words.split())
    write_settings(tmp_path, args.settings.resolved(args, config, run))
    again, (config_again, run_again) = made("--config", tmp_path / "config.yaml")
    assert config_again == config
    assert run_again == run.replace(resume="auto")  # how one start began is no setting of the run
    assert (again.model, again.init_frames) == ("vit_tiny", 8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    from vmae.synthetic.samples import sample_videos

    path = tmp_path_factory.mktemp("list") / "list.txt"
    path.write_text("".join(f"{video} 0 -1\n" for video in sample_videos()[2:]))
    return path


# --- `--help`


def test_help_of_training_loads_no_model():
    """It takes less than 0.5 s beyond `import torch`; what takes longer is kept out."""
    program = (
        "import sys; from vmae.cli import build_parser\n"
        f"for command in {sorted(SETTINGS)}: build_parser(command)\n"
        "print(*{'vmae_kernels', 'vmae.model', 'torch._dynamo', 'vmae.train.run'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "" and done.returncode == 0, done.stdout + done.stderr


SHARED = {  # setting: the commands where the words stand for something else
    (RunConfig, "device"): ("check-data", "pack"),
    (SpeedConfig, "attention"): ("parity",),
    (SpeedConfig, "backend"): ("parity", "check-data"),
    (SpeedConfig, "num_workers"): ("check-data", "pack", "index", "moving-shapes", "moving-actors"),
    (TrainingConfig, "dtype"): ("doctor",),
    (ModelConfig, "num_frames"): ("convert",),
    (ModelConfig, "img_size"): ("convert",),
}


@pytest.mark.parametrize(("config", "name"), SHARED, ids=lambda part: getattr(part, "__name__", part))
def test_help_is_written_once(config, name):
    """Commands that share a setting share its words, but for the default."""
    about, found = about_field(config, name), 0
    for command in COMMANDS:
        if command not in SHARED[config, name]:
            for action in flags_of(command).values():
                if action.dest == (about.name or name):
                    assert action.help.startswith(about.help), command
                    found += 1
    assert found >= 5


def test_the_table_of_settings_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import write_settings

    assert write_settings.PAGE.read_text(encoding="utf-8") == write_settings.page(), (
        "run `python docs/write_settings.py`"
    )
