"""The door: any checkpoint as a model of a kind, at another size, or a line on why not."""

import argparse

import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint import (
    Source,
    export_weights,
    find_weights,
    kind_of,
    load_classifier,
    read_checkpoint,
    save_pretrained,
    to_model,
)
from vmae.checkpoint.folder import CheckpointFolder
from vmae.checkpoint.saver import Saver
from vmae.cli import main
from vmae.evaluate.encoder import load_encoder
from vmae.model.detector import build_detector

CONFIG = ModelConfig.preset(
    "vit_tiny", img_size=32, num_frames=4, depth=1, decoder_depth=1, drop_path_rate=0.1
)


def saved(path, model, **settings):
    export_weights(path, model.state_dict(), config={"model": model.config.to_dict(), **settings})
    return read_checkpoint(path)


def test_every_kind_comes_back(tmp_path):
    """The report counts what was loaded; models are in eval mode, without stochastic depth."""
    pretrainer, classifier = build_pretrainer(CONFIG), build_classifier(CONFIG, 3)
    detector = build_detector(CONFIG, 3)
    sources = {
        "pretrainer": saved(tmp_path / "p.pth", pretrainer),
        "classifier": saved(tmp_path / "c.pth", classifier),
        "detector": saved(tmp_path / "d.pth", detector),
    }
    for (kind, source), original in zip(sources.items(), (pretrainer, classifier, detector)):
        model, report = to_model(source, kind)
        assert type(model) is type(original) and not model.training
        assert model.config == CONFIG.replace(drop_path_rate=0.0) and source.config == CONFIG
        for name, value in original.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert f"{len(model.state_dict())} tensors loaded" in report
        assert source.pretrained == (kind == "pretrainer") and kind_of(source) != "encoder"
    encoder, report = to_model(sources["pretrainer"], "encoder", {"num_frames": 8, "img_size": 64})
    assert (
        encoder.num_classes == 0 and encoder.config.pos_grid == CONFIG.grid and "dropped (decoder)" in report
    )
    assert encoder.tokens(torch.zeros(1, 8, 64, 64, 3, dtype=torch.uint8)).shape == (1, 64, 128)
    fewer, report = to_model(sources["classifier"], "classifier", label_map=[2, 0])
    assert torch.equal(fewer.head.weight, classifier.head.weight[[2, 0]]) and "converted to 2" in report
    assert to_model(sources["detector"], "detector", num_classes=3)[0].num_classes == 3


def test_what_cannot_be_is_a_line(tmp_path):
    source = saved(tmp_path / "p.pth", build_pretrainer(CONFIG))
    for kind in ("classifier", "detector"):
        with pytest.raises(InputError, match="p.pth has no head"):
            to_model(source, kind)
    with pytest.raises(InputError, match="unknown kind of model 'decoder'; known: pretrainer, encoder"):
        to_model(source, "decoder")
    headed = saved(tmp_path / "c.pth", build_classifier(CONFIG, 3))
    with pytest.raises(InputError, match="c.pth has no decoder"):
        to_model(headed, "pretrainer")
    with pytest.raises(InputError, match=r"(?s)c.pth is of another.*norm.weight"):
        to_model(headed, "detector")
    torch.save({"model": build_classifier(CONFIG, 3).state_dict()}, tmp_path / "official.pth")
    unknown = read_checkpoint(tmp_path / "official.pth")
    assert unknown.settings == {} and unknown.known is None and len(unknown.state) > 10
    with pytest.raises(InputError, match="official.pth does not say which architecture it is of"):
        to_model(unknown, "classifier")
    with pytest.raises(InputError, match="gone.pth does not exist"):
        read_checkpoint(tmp_path / "gone.pth")


def test_prefixes_of_wrappers_are_removed(tmp_path, capsys):
    """Before every use: a compiled pre-trainer's file is read, and exported under published names."""
    model = build_pretrainer(CONFIG)
    state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace(num_frames=4, input_size=32)}, tmp_path / "w.pth")
    source = read_checkpoint(tmp_path / "w.pth", preset="vit_tiny", depth=1, decoder_depth=1)
    assert source.state.keys() == model.state_dict().keys() and source.note == ""
    assert torch.equal(to_model(source, "pretrainer")[0].mask_token, model.mask_token)
    assert main(["export", str(tmp_path / "w.pth"), str(tmp_path / "out.pth")]) == 0
    assert read_checkpoint(tmp_path / "out.pth").state.keys() == model.state_dict().keys()


def test_averaged_weights_of_a_training_checkpoint(tmp_path):
    live, averaged = build_classifier(CONFIG, 3), build_classifier(CONFIG, 3)
    tensors = {"model": live.state_dict(), "ema": averaged.state_dict()}
    Saver(CheckpointFolder(tmp_path)).save(2, tensors, {"config": {"model": CONFIG.to_dict()}})
    for flag, model in ((False, live), (True, averaged)):
        source = read_checkpoint(tmp_path, averaged=flag)
        assert source.path.name == "checkpoint-00000002" and source.settings["model"]["depth"] == 1
        assert torch.equal(source.state["head.weight"], model.head.weight)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_folder_of_transformers_is_read(tmp_path, pooling):
    """By every command that reads a checkpoint, with its class names; a run's own weights come first."""
    folder = tmp_path / "folder"
    original = build_classifier(CONFIG.replace(drop_path_rate=0.0), 3, pooling=pooling).eval()
    save_pretrained(original, folder, ["a", "b", "c"], multi_label=True)
    loaded = load_classifier(folder)
    assert loaded.class_names == ("a", "b", "c") and loaded.multi_label and loaded.path == folder
    clip = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(loaded.model(clip), original(clip)) and loaded.model.pooling == pooling
    assert not load_encoder(folder).pretrained and kind_of(read_checkpoint(folder)) == "classifier"
    with pytest.raises(InputError, match="folder has no averaged weights"):
        read_checkpoint(folder, averaged=True)
    export_weights(folder / "weights.pth", build_pretrainer(CONFIG).state_dict())
    assert find_weights(folder) == folder / "weights.pth"


def test_a_source_describes_itself(tmp_path):
    source = Source(tmp_path / "w.pth", {}, {}, None, "w.pth: taken as 16 frames")
    assert source.describe("w.pth: 3 tensors loaded") == "w.pth: 3 tensors loaded\nw.pth: taken as 16 frames"
    assert Source(tmp_path, {}, {}, None).describe("one") == "one"
