"""`python -m vmae pretrain` on real clips: what it leaves behind, exact resume, and every wrong input,
named."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vmae import InputError, ModelConfig, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder, export_weights
from vmae.checkpoint.format import read_group, read_manifest
from vmae.cli import main
from vmae.config import PRESETS
from vmae.data.dali import dali_missing
from vmae.synthetic.samples import sample_videos
from vmae.train.loop import Trainer
from vmae.train.metrics import loss_of_last_tenth, read_log
from vmae.train.resume import setting_changes

ROOT = Path(__file__).parents[2]
MICRO = dict(embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
# 4 x 4 x 4 tokens of 8-pixel patches: running cell and tube 0.75 both leave something to see and to count.
SMALL = "--model micro --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75".split()
SMALL += ["--no-tensorboard"]
RUN = "--batch-size 2 --steps 6 --workers 0 --lr 0.1 --drop-path 0.2 --clip-grad 1 --log-every 1".split()
RUN += ["--device", "cpu"]


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(PRESETS, "micro", MICRO)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A list of the two clips that decode fastest."""
    path = tmp_path_factory.mktemp("list") / "list.txt"
    path.write_text("# two real clips\n" + "".join(f"{video} 0 -1\n" for video in sample_videos()[2:]))
    return path


def pretrain(videos, output, *flags: str) -> int:
    return main(["pretrain", "--data", str(videos), "--output", str(output), *SMALL, *RUN, *flags])


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(monkeypatch, step: int, number: int) -> None:
    """Send a signal during step `step`."""
    plain = Trainer.clip

    def clip(self, record):
        if record.step + 1 == step:
            os.kill(os.getpid(), number)
        return plain(self, record)

    monkeypatch.setattr(Trainer, "clip", clip)


def test_a_run_leaves_logs_settings_checkpoint_and_weights(videos, tmp_path, capsys):
    out = tmp_path / "a" / "run"
    assert pretrain(videos, out, "--num-sample", "2", "--repeat", "4") == 0
    text = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-00000006",
        "config.yaml",
        "log.jsonl",
        "run.json",
        "weights.pth",
    ]
    assert "effective batch 2 videos (2 x 1 micro-batches x 1 ranks), 4 clips a step" in text
    assert "0.1 x 2 / 256 = 0.000781" in text
    assert "trivial predictors on the first batch: zero 0.9" in text
    assert "64 tokens (tube 0.75: 16 visible; running_cell 0.5: 32 decoded, 24 counted" in text
    assert all(str(out / name) in text for name in ("weights.pth", "log.jsonl", "run.json"))
    records = read_log(out / "log.jsonl")
    assert len(records) == 6 and records[3]["epoch"] == 1.0  # 2 videos x 4 visits in batches of 2
    start = json.loads((out / "run.json").read_text())["starts"][0]
    assert start["torch"] == torch.__version__ and start["config"]["results"]["model"]["embed_dim"] == 48
    weights = torch.load(out / "weights.pth", weights_only=True)
    fresh = build_pretrainer(ModelConfig.from_dict(weights["config"]["model"]))
    fresh.load_state_dict(weights["model"], strict=True)
    assert "encoder.blocks.0.attn.q_bias" in weights["model"]


def test_a_mix_is_described_and_its_samples_counted(tmp_path, capsys):
    for name, video in zip(("one", "two"), sample_videos()[2:], strict=True):
        (tmp_path / f"{name}.txt").write_text(f"{video} 0 -1\n" * 2)
    sources = "- {list: one.txt, weight: 3}\n- {list: two.txt, weight: 1, stride: 2}\n"
    (tmp_path / "mix.yaml").write_text(f"sources:\n{sources}")
    assert pretrain(tmp_path / "mix.yaml", tmp_path / "run", "--log-every", "2") == 0
    text = capsys.readouterr().out
    assert (
        "one: 2 videos, 0.00222 hours, 75.0% of samples\n" in text and "25.0% of samples, stride 2\n" in text
    )
    assert "weighted mixing of 2 sources, 4 videos" in text
    records = read_log(tmp_path / "run" / "log.jsonl")  # 4 samples an epoch: 2 steps
    assert [r["samples"] for r in records] == [{"one": 3 * n, "two": n} for n in (1, 2, 3)]


@pytest.mark.slow
def test_sampling_flip_and_resize_reach_the_clips(videos, tmp_path):
    def first_loss(*flags):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        assert pretrain(videos, output, "--steps", "1", "--stride", "5", "--num-sample", "3", *flags) == 0
        return losses(output)

    plain = first_loss()
    for flags in ("--sampling exact", "--sampling fps --fps 7", "--flip", "--resize pil", "--crop center"):
        assert first_loss(*flags.split()) != plain, flags
    assert first_loss(*"--sampling published --no-flip --resize torch --crop published".split()) == plain


@pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
def test_a_run_with_dali_sees_the_same_samples(videos, tmp_path):
    for loader in ("cpu", "dali"):  # H.264 on a CPU: the loader's way round DALI, so the very same losses
        assert pretrain(videos, tmp_path / loader, "--loader", loader, "--num-sample", "2") == 0
    assert losses(tmp_path / "cpu") == losses(tmp_path / "dali")


# One encoder-only, one where clips of a batch count unequally many tokens, one of whole frames.
@pytest.mark.parametrize(
    "flags",
    [
        "--decoder-mask none",
        "--encoder-mask random --decoder-mask random",
        "--encoder-mask frame --decoder-mask frame",
        "--no-normalize-target",
    ],
)
def test_other_masks_and_targets_train(videos, tmp_path, monkeypatch, flags):
    """And their FLOPs are counted: utilisation is in the log of every mask (here in FLOP/s, no peak of a CPU
    is known)."""
    monkeypatch.setattr("vmae.train.loop.flops_utilisation", lambda flops, device, dtype: flops)
    assert pretrain(videos, tmp_path, *flags.split(), "--steps", "2") == 0
    assert len(losses(tmp_path)) == 2
    assert all(record["mfu"] / record["clips_per_s"] > 1e6 for record in read_log(tmp_path / "log.jsonl"))


def test_bfloat16_trains_close_to_float32(videos, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert pretrain(videos, tmp_path / dtype, "--dtype", dtype) == 0
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=0.02)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")


@pytest.mark.slow
def test_loss_falls_below_the_zero_predictors(videos, tmp_path):
    flags = "--steps 150 --batch-size 2 --num-sample 4 --lr 0.4 --warmup-steps 10 --encoder-ratio 0.5"
    flags += " --drop-path 0"
    assert pretrain(videos, tmp_path, *flags.split()) == 0
    assert loss_of_last_tenth(read_log(tmp_path / "log.jsonl"), 150) < 0.97


@pytest.mark.parametrize(
    ("first_workers", "then_workers"), [(0, 0), (1, 0)]
)  # the same samples whoever decodes
def test_resumed_run_is_bit_identical(videos, tmp_path, monkeypatch, capsys, first_workers, then_workers):
    assert pretrain(videos, tmp_path / "straight") == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 3, signal.SIGTERM)
        assert pretrain(videos, tmp_path / "halves", "--workers", str(first_workers)) == 0
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    assert not (tmp_path / "halves" / "weights.pth").exists()
    assert pretrain(videos, tmp_path / "halves", "--workers", str(then_workers)) == 0
    assert "resuming from" in capsys.readouterr().out
    assert losses(tmp_path / "straight") == losses(tmp_path / "halves")
    for group in ("model", "optimizer"):
        whole, halves = (
            read_group(tmp_path / name / "checkpoint-00000006", group) for name in ("straight", "halves")
        )
        assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    assert len(json.loads((tmp_path / "halves" / "run.json").read_text())["starts"]) == 2


def test_ctrl_c_leaves_a_checkpoint_and_exits_130(videos, tmp_path, monkeypatch):
    stop_after(monkeypatch, 2, signal.SIGINT)
    assert pretrain(videos, tmp_path) == 130
    assert CheckpointFolder(tmp_path).latest().name == "checkpoint-00000002"


@pytest.mark.parametrize(
    ("crop", "told"), [("published", []), ("center", ["crop published in the checkpoint, center now"])]
)
def test_a_checkpoint_without_a_newer_setting_had_its_default(
    crop, told, videos, tmp_path, capsys, monkeypatch
):
    assert pretrain(videos, tmp_path, "--steps", "1", "--warmup-steps", "0", "--crop", crop) == 0

    def read_older(path: Path) -> dict:
        manifest = read_manifest(path)
        del manifest["config"]["crop"], manifest["config"]["model"]["cos_attn"]
        return manifest

    monkeypatch.setattr("vmae.train.prepare.read_manifest", read_older)
    capsys.readouterr()
    assert pretrain(videos, tmp_path, "--steps", "2", "--warmup-steps", "0", "--crop", crop) == 0
    notes = re.findall("note: setting changed: (.*)", capsys.readouterr().out)
    assert sorted(notes) == [*told, "steps 1 in the checkpoint, 2 now"]


def test_a_complete_run_is_left_alone_and_more_steps_go_on(videos, tmp_path, capsys):
    assert pretrain(videos, tmp_path) == 0
    before = contents(tmp_path)
    (tmp_path / "weights.pth").unlink()  # as if killed just before the export
    capsys.readouterr()
    assert pretrain(videos, tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert pretrain(videos, tmp_path, "--steps", "8") == 0
    text = capsys.readouterr().out
    assert "steps 6 in the checkpoint, 8 now" in text and "steps: 6 to 8" in text
    assert len(losses(tmp_path)) == 8


def test_fresh_start_says_so_and_moves_an_earlier_run(videos, tmp_path, capsys):
    (tmp_path / ".checkpoint-00000004.unfinished").write_bytes(b"half")
    assert pretrain(videos, tmp_path, "--steps", "2") == 0
    assert (
        "no complete checkpoint (only .checkpoint-00000004.unfinished): a fresh start"
        in capsys.readouterr().out
    )
    assert pretrain(videos, tmp_path, "--steps", "2", "--no-resume", "--seed", "1") == 0
    assert f"to {tmp_path / 'previous-1'}" in capsys.readouterr().out
    assert len(losses(tmp_path)) == len(losses(tmp_path / "previous-1")) == 2
    assert losses(tmp_path) != losses(tmp_path / "previous-1")


def damage(checkpoint: Path, kind: str) -> None:
    shard = checkpoint / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    if kind == "missing":
        shard.unlink()
        return
    if kind == "truncated":
        del content[1000:]
    else:
        content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "has 1000 bytes instead of"),
        ("bit-flipped", "its SHA-256 differs"),
        ("missing", "is missing"),
    ],
)
def test_a_damaged_shard_is_refused_by_name_and_the_checkpoint_before_is_used_if_asked(
    videos, tmp_path, capsys, kind, words
):
    assert pretrain(videos, tmp_path, "--save-every", "2") == 0
    expected = losses(tmp_path)
    newest = tmp_path / "checkpoint-00000006"
    damage(newest, kind)
    assert pretrain(videos, tmp_path) == 2
    error = capsys.readouterr().err
    assert (
        "checkpoint-00000006 is damaged: __0_0.distcp" in error
        and words in error
        and "--resume last-good" in error
    )
    assert pretrain(videos, tmp_path, "--resume", "last-good") == 0
    text = capsys.readouterr().out
    assert (
        "passed over, damaged: checkpoint-00000006: __0_0.distcp" in text
        and "checkpoint-00000004, step 4" in text
    )
    assert losses(tmp_path) == expected
    assert (tmp_path / "previous-1" / newest.name).exists()


def test_a_checkpoint_can_be_named(videos, tmp_path):
    assert pretrain(videos, tmp_path, "--save-every", "2") == 0
    expected = losses(tmp_path)
    assert pretrain(videos, tmp_path, "--resume", str(tmp_path / "checkpoint-00000002")) == 0
    assert losses(tmp_path) == expected


def test_another_effective_batch_is_refused_and_another_split_of_it_is_not(videos, tmp_path, capsys):
    assert pretrain(videos, tmp_path, "--steps", "1") == 0
    assert pretrain(videos, tmp_path, "--batch-size", "3", "--accumulate", "2", "--steps", "2") == 2
    error = capsys.readouterr().err
    assert (
        "takes 2 videos a step; --batch-size 3 x --accumulate 2 x 1 ranks make 6" in error
        and "product is 2" in error
    )
    assert pretrain(videos, tmp_path, "--batch-size", "1", "--accumulate", "2", "--steps", "2") == 0


def test_init_takes_full_and_encoder_only_weights(videos, tmp_path, capsys):
    model = build_pretrainer(ModelConfig(img_size=32, patch_size=8, num_frames=8, **MICRO))
    export_weights(tmp_path / "all.pth", model.state_dict())
    encoder = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    torch.save({"module": encoder}, tmp_path / "encoder.pth")
    for name, line in (("all.pth", "tensors loaded"), ("encoder.pth", "start fresh")):
        assert (
            pretrain(
                videos, tmp_path / name[:3], "--init", str(tmp_path / name), "--steps", "1", "--lr", "1e-9"
            )
            == 0
        )
        assert line in capsys.readouterr().out
        trained = torch.load(tmp_path / name[:3] / "weights.pth", weights_only=True)["model"]
        torch.testing.assert_close(trained["encoder.norm.weight"], model.state_dict()["encoder.norm.weight"])
        torch.testing.assert_close(
            trained["encoder.blocks.0.mlp.fc1.weight"], encoder["encoder.blocks.0.mlp.fc1.weight"]
        )


def test_dry_run_prints_what_is_resolved_and_writes_nothing(videos, tmp_path, capsys):
    out = tmp_path / "run"
    assert pretrain(videos, out, "--dry-run", "--repeat", "10", "--steps", "50") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["derived"]["steps_per_epoch"] == 10 and shown["results"]["warmup_steps"] == 5
    assert shown["derived"]["peak_lr"] == pytest.approx(0.1 * 2 / 256)
    assert not out.exists()


def test_published_names_and_values_work(videos, tmp_path, capsys):
    flags = f"""--data_path {videos} --output_dir {tmp_path / "run"}
        --model pretrain_videomae_small_patch16_224 --mask_type tube --mask_ratio 0.9
        --decoder_mask_type run_cell --decoder_mask_ratio 0.5 --batch_size 32 --num_sample 4
        --num_frames 16 --sampling_rate 4 --opt adamw --opt_betas 0.9 0.95 --opt_eps 1e-8
        --warmup_epochs 30 --epochs 300 --lr 6e-4 --min_lr 1e-5 --clip_grad 0.02 --drop_path 0.1
        --weight_decay 0.05 --decoder_depth 4 --num_workers 2 --device cpu --dry-run"""
    assert main(["pretrain", *flags.split()]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (
        shown["results"]["mask"]["decoder"] == "running_cell"
        and shown["results"]["model"]["embed_dim"] == 384
    )
    assert shown["results"]["steps"] == 300 and shown["results"]["warmup_steps"] == 30
    assert shown["results"]["optim"]["betas"] == [0.9, 0.95] and shown["derived"]["peak_lr"] == pytest.approx(
        6e-4 / 8
    )


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [
        ("--epochs 800", 40),
        ("--epochs 20", 2),
        ("--steps 100", 10),
        ("--steps 100 --warmup-epochs 30", 30),
        ("--epochs 20 --warmup-steps 7", 7),
    ],
)
def test_default_warm_up(videos, tmp_path, capsys, flags, warmup):
    args = [
        "pretrain",
        "--data",
        str(videos),
        "--output",
        str(tmp_path / "run"),
        *SMALL,
        "--dry-run",
        *flags.split(),
    ]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["results"]["warmup_steps"] == warmup


def broken_lists(folder: Path) -> dict[str, tuple[str, str]]:
    """Name of a list -> (its text, what the message must hold)."""
    (folder / "text.mp4").write_text("no video")
    (folder / "empty").mkdir()
    video = sample_videos()[2]
    return {
        "empty": ("# nothing\n", "no entries"),
        "malformed": (f"{video} 0 -1\n{video} 0 many\n", "line 2"),
        "gone": ("gone.mp4 0 -1\n", "gone.mp4"),
        "undecodable": (f"{folder / 'text.mp4'} 0 -1\n", "undecodable"),
        "no frames": (f"{folder / 'empty'} 1 0\n", "0 frames"),
    }


@pytest.mark.parametrize("name", ["missing", "empty", "malformed", "gone", "undecodable", "no frames"])
def test_wrong_lists_are_named_and_nothing_is_written(tmp_path, capsys, name):
    text, words = broken_lists(tmp_path).get(name, (None, "missing.txt"))
    path = tmp_path / f"{name}.txt"
    if text is not None:
        path.write_text(text)
    assert pretrain(path, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr nan", "--lr: must be a number above 0 and at most 10,000, not nan"),
        ("--eps=-inf", "--eps/--opt_eps: must be a number above 0 and at most 1, not -inf"),
        ("--betas 0.9 inf", "--betas/--opt_betas: must be a number at least 0 and below 1, not inf"),
        (
            "--image-size 100000",
            "--image-size/--input_size: must be a side in pixels, or HEIGHTxWIDTH, each a whole",
        ),
        ("--image-size 8192 --patch-size 8 --num-frames 4", "2,097,152 tokens; a clip may have 1,048,576"),
        ("--image-size 36", "36 is not divisible by the patch size 8"),
        ("--num-frames 7", "7 frames are not divisible by the tubelet size 2"),
        ("--encoder-ratio 1", "--encoder-ratio/--mask_ratio: must be a number at least 0 and below 1, not 1"),
        ("--encoder-mask frame --encoder-ratio 0.75 --num-frames 2", "the loss would count no token"),
        ("--decoder-mask random --decoder-ratio 0.98", "the loss would count no token in 1 of 17 clips"),
        (
            "--encoder-mask frame --decoder-mask frame --encoder-ratio 0.5",
            "the loss would count no token in 1 of 6 clips",
        ),
        ("--decoder-ratio 0.3", "0.25, 0.5 or 0.75"),
        ("--image-size 40", "cannot tile a frame of 5 x 5"),
        ("--model vit_xxl", "unknown model preset 'vit_xxl'; known: vit_s"),
        ("--encoder-mask cube", "unknown encoder mask 'cube'"),
        ("--device cuda:99", "cuda:99"),
        ("--device tpu", "unknown device 'tpu'"),
        ("--backend magic", "unknown backend 'magic'"),
        ("--attention magic", "unknown attention backend 'magic'"),
        ("--attention flash2", "attention backend 'flash2' cannot run"),
        ("--dtype float16", "unknown dtype 'float16'"),
        ("--parallel magic", "unknown --parallel 'magic'"),
        ("--parallel fsdp --shard-size 2", "--shard-size is for --parallel hybrid"),
        ("--checkpointing some", "unknown checkpointing 'some'"),
        ("--accumulate 0", "--accumulate/--update_freq: must be a whole number from 1 to"),
        ("--keep-every 0", "--keep-every: must be a whole number from 1 to"),
        ("--resume weights.pth", "weights.pth does not exist"),
        ("--warmup-steps 7", "warm-up of 7 steps does not fit into 6"),
        ("--lr 0", "--lr: must be a number above 0 and"),
        ("--batch-size 0", "--batch-size/--batch_size: must be a whole number from 1 to"),
        ("--steps 0", "--steps: must be a whole number from 1 to"),
        ("--seed -1", "--seed: must be a whole number from 0 to"),
        ("--workers -1", "--workers/--num_workers: must be a whole number from 0 to"),
        ("--keep 0", "--keep: must be a whole number from 1 to"),
        ("--log-every 0", "--log-every: must be a whole number from 1 to"),
        ("--init gone.pth", "gone.pth does not exist"),
        ("--resume gone.pth", "gone.pth does not exist"),
        ("--data-root gone", "gone"),
        ("--sampling uniform", "unknown sampling 'uniform'; known: published, exact, fps"),
        ("--crop middle", "unknown crop 'middle'; known: published, center"),
        ("--sampling fps", "sampling by fps needs `fps` above 0"),
        ("--fps 8", "sampling by fps needs `fps` above 0"),
        ("--resize nearest", "unknown resize 'nearest'; known: torch, pil"),
        ("--loader gpu", "unknown loader 'gpu'; known: cpu, dali"),
        ("--max-bad-share 2", "--max-bad-share: must be a number at least 0 and at most 1, not 2"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_written(videos, tmp_path, capsys, flags, words):
    assert pretrain(videos, tmp_path / "run", *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_output_that_is_a_file_or_below_one_is_refused(videos, tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    assert pretrain(videos, tmp_path / "file" / below) == 2
    assert f"not writable: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_output_without_permission_is_refused(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # the tests may run as root, whom nothing is denied
    assert pretrain(videos, tmp_path / "run") == 2
    assert "no permission" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_another_architecture_is_refused_with_settings_keys_and_shapes(videos, tmp_path, capsys, monkeypatch):
    assert pretrain(videos, tmp_path, "--steps", "1") == 0
    before = contents(tmp_path)
    monkeypatch.setitem(PRESETS, "wider", {**MICRO, "embed_dim": 64, "depth": 3})
    assert pretrain(videos, tmp_path, "--model", "wider") == 2
    error = capsys.readouterr().err
    assert (
        "model.embed_dim 48 in the checkpoint, 64 now" in error
        and "model.depth 2 in the checkpoint, 3 now" in error
    )
    assert "encoder.norm.weight" in error or "encoder.patch_embed.proj.weight: [48" in error
    assert "encoder.blocks.2" in error and "--no-resume" in error
    # The shapes are the same, the function is not: positions of other frames.
    assert pretrain(videos, tmp_path, "--num-frames", "16") == 2
    assert "model.num_frames 8 in the checkpoint, 16 now" in capsys.readouterr().err
    assert (
        pretrain(videos, tmp_path / "new", "--model", "wider", "--init", str(tmp_path / "weights.pth")) == 2
    )
    assert "encoder.blocks.2" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_nan_exits_with_the_samples_of_the_batch(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "clip", lambda self, record: torch.tensor(float("nan")))
    assert pretrain(videos, tmp_path) == 2
    assert "nonfinite.json" in capsys.readouterr().err
    ids = json.loads((tmp_path / "nonfinite.json").read_text())["ids"]
    assert {Path(path).name for _, _, path in ids} == {"carphone_pristine.mp4", "carphone_distorted.mp4"}


def test_setting_changes_are_found_at_any_depth():
    before, now = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "e": 3}}
    assert setting_changes(before, now) == {
        "b.c": "b.c 2 in the checkpoint, 5 now",
        "b.d": "b.d 3 in the checkpoint, None now",
        "b.e": "b.e None in the checkpoint, 3 now",
    }


def start_process(videos: Path, output: Path) -> subprocess.Popen:
    """A real run with a data worker, in a process group of its own."""
    flags = [*SMALL[2:], *RUN, "--model", "vit_tiny", "--steps", "100000", "--workers", "1"]
    command = [
        sys.executable,
        "-m",
        "vmae",
        "pretrain",
        "--data",
        str(videos),
        "--output",
        str(output),
        *flags,
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=pipe, stderr=pipe, text=True
    )


# To the whole group, as `timeout`, Slurm and a terminal send it: the data workers get it too.
@pytest.mark.slow  # 5 s each
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_to_the_group_leaves_a_usable_checkpoint(videos, tmp_path, number, code):
    process = start_process(videos, tmp_path / "run")
    try:
        deadline = time.monotonic() + 60
        while (
            len(read_log(tmp_path / "run" / "log.jsonl")) < 3
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.05)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err
    assert "Traceback" not in err and "stopped by" in out
    assert (
        read_manifest(CheckpointFolder(tmp_path / "run").latest())["step"]
        == len(losses(tmp_path / "run"))
        >= 3
    )


def test_messages_hold_no_traceback(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
    command = [sys.executable, "-m", "vmae", "pretrain", "--data", "gone.txt", "--output", "run"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "gone.txt" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_config_classes_refuse_unknown_settings():
    from vmae.train.pretrain_settings import RunConfig

    with pytest.raises(InputError, match="unknown setting speeed"):
        RunConfig.from_dict({"output": "x", "speeed": 1})
