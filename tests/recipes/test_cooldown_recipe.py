"""The cool-down on longer clips: what the recipe asks for, and that 16-frame weights start it well."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from vmae import DualMask, ModelConfig, build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.cli import build_parser, main
from vmae.config import PRESETS
from vmae.model.embed import interpolate_positions, sine_cosine_positions
from vmae.synthetic.samples import sample_videos
from vmae.train import pretrain_settings

RECIPE = Path(__file__).parents[2] / "recipes" / "cooldown_vitb_64f.sh"
MICRO = dict(embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
MICRO |= dict(img_size=32, patch_size=8, num_frames=8)


def run(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    names = ("DATA", "INIT", "GPUS", "NODES", "BATCH", "EFFECTIVE_BATCH", "OUTPUT")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    env = {**clean, "PYTHON": "echo", "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(RECIPE), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_it_says_what_is_missing(tmp_path):
    done = run(cwd=tmp_path, DATA="x", GPUS="1")
    assert done.returncode == 2 and "INIT is not set: set it to the 16-frame run" in done.stderr


def test_its_clips_are_longer_and_its_positions_those_of_the_16_frames(tmp_path, monkeypatch):
    done = run("--image-size", "384", "--dry-run", cwd=tmp_path, INIT="runs/b", DATA="list.txt", GPUS="8")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("command:"))
    command = shlex.split(line)
    assert command[command.index("--init") + 1] == "runs/b"
    monkeypatch.setenv("WORLD_SIZE", "8")
    words = command[command.index("pretrain") :]
    config, settings = pretrain_settings.configs_from_args(build_parser("pretrain").parse_args(words))
    model, usual = config.model, ModelConfig.preset("vit_b")
    assert (model.num_frames, model.img_size, model.pos_grid) == (64, 384, usual.grid)
    assert model.replace(num_frames=16, img_size=224, pos_grid=None) == usual
    assert settings.batch_size * settings.accumulate * 8 == config.effective_batch == 1024
    published = pretrain_settings.OptimConfig(lr=1e-3)
    assert config.optim.lr == pytest.approx(published.lr / 10) and config.epochs == 200 * 0.05


def learned(config: ModelConfig) -> tuple[dict, torch.Tensor]:
    """Weights that know one still picture by heart, and the picture: uint8 [H, W, 3]."""
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (*config.image_hw, 3), dtype=torch.uint8)
    model = build_pretrainer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        model(still(picture, config), drawn(config, step)).backward()
        optimizer.step()
    return model.state_dict(), picture


def still(picture: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return picture.expand(4, config.num_frames, *picture.shape)


def drawn(config: ModelConfig, seed: int) -> DualMask:
    generator = torch.Generator().manual_seed(seed)
    return DualMask.sample(4, config.grid, encoder_ratio=0.75, generator=generator)


@pytest.mark.slow
def test_weights_of_short_clips_start_longer_ones_better_than_fresh_ones():
    short = ModelConfig.from_dict(MICRO)
    state, picture = learned(short)
    losses = {}
    for frames in (8, 16, 32):
        longer = short.replace(num_frames=frames)
        for name, config in (("alone", longer), ("interpolated", longer.replace(pos_grid=short.grid))):
            model = build_pretrainer(config)
            fresh = model(still(picture, config), drawn(config, 999)).item()
            model.load_state_dict(state)
            losses[frames, name] = model(still(picture, config), drawn(config, 999)).item()
            assert losses[frames, name] < fresh or name == "alone"
    known = losses[8, "alone"]
    assert losses[8, "interpolated"] == known
    for frames in (16, 32):
        # Some error comes where positions fall between those of training; more where they are new.
        assert known < losses[frames, "interpolated"] < 0.8 * losses[frames, "alone"], losses


def test_positions_of_encoder_and_decoder_are_interpolated():
    short = ModelConfig.from_dict(MICRO)
    config = short.replace(num_frames=16, pos_grid=short.grid)
    model = build_pretrainer(config)
    for table, dim in ((model.encoder.pos_embed, 48), (model.pos_embed, 32)):
        own = sine_cosine_positions(short.num_tokens, dim)
        assert torch.equal(table, interpolate_positions(own, short.grid, config.grid))
    assert torch.equal(build_pretrainer(short).pos_embed, sine_cosine_positions(short.num_tokens, 32))


def test_a_start_on_another_grid_is_told_how_to_keep_its_positions(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    config = ModelConfig.from_dict(MICRO)
    model = build_pretrainer(config)
    export_weights(tmp_path / "short.pth", model.state_dict(), config={"model": config.to_dict()})
    (tmp_path / "list.txt").write_text(f"{sample_videos()[2]} 0 -1\n")
    flags = ["--data", str(tmp_path / "list.txt"), "--init", str(tmp_path / "short.pth"), "--model", "micro"]
    flags += "--image-size 32 --num-frames 16 --encoder-ratio 0.75 --batch-size 1 --steps 1".split()
    flags += "--workers 0 --device cpu --no-tensorboard --stride 1".split()
    assert main(["pretrain", *flags, "--output", str(tmp_path / "a")]) == 0
    assert "positions are of 4 x 4 x 4 tokens, the model's of 8 x 4 x 4" in (said := capsys.readouterr().out)
    assert "--pos-grid 4 4 4 interpolates them" in said
    assert main(["pretrain", *flags, "--output", str(tmp_path / "b"), "--pos-grid", "4", "4", "4"]) == 0
    assert "interpolates them" not in capsys.readouterr().out
