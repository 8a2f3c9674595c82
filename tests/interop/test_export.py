"""`python -m vmae export`: one file with published names from whatever holds weights."""

import pytest
import torch

from vmae import ModelConfig, build_pretrainer
from vmae.cli import main
from vmae.evaluate.reconstruct import load_model
from vmae.interop.upstream import load_weights
from vmae.train.checkpoint import CheckpointFolder
from vmae.train.saver import Saver

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4, depth=1)


@pytest.fixture
def run(tmp_path):
    """A run's folder with two checkpoints, and the newer one's weights."""
    for step in (1, 2):
        state = build_pretrainer(CONFIG).state_dict()
        about = {"config": {"model": CONFIG.to_dict(), "stride": 2}}
        Saver(CheckpointFolder(tmp_path / "run")).save(step, {"model": state, "optimizer": {}}, about)
    return tmp_path / "run", state


@pytest.mark.parametrize("name", ["out.pth", "new/out.safetensors"])
@pytest.mark.parametrize("source", ["", "checkpoint-00000002"])
def test_a_runs_newest_weights_become_one_file(run, tmp_path, capsys, name, source):
    folder, state = run
    assert main(["export", str(folder / source), str(tmp_path / name)]) == 0
    assert f"checkpoint-00000002: {len(state)} tensors" in capsys.readouterr().out
    read = load_weights(tmp_path / name)
    assert read.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in read.items())
    model, settings = load_model(tmp_path / name)  # the file says which architecture it is of
    assert model.config == CONFIG and settings["stride"] == 2


def test_official_weights_are_converted_too(tmp_path):
    state = build_pretrainer(CONFIG).state_dict()
    torch.save({"module": state}, tmp_path / "official.pth")
    assert main(["export", str(tmp_path / "official.pth"), str(tmp_path / "out.safetensors")]) == 0
    assert load_weights(tmp_path / "out.safetensors").keys() == state.keys()


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [("gone", "out.pth", "gone does not exist"), (".", "out.pth", "holds no complete checkpoint"),
     ("run", "out.bin", "must end with .pth"), ("run", "file/out.pth", "not writable")],
)  # fmt: skip
def test_wrong_input_is_named(run, tmp_path, monkeypatch, capsys, source, output, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["export", source, output]) == 2
    assert words in capsys.readouterr().err
