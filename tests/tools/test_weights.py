"""`vmae weights` lists what was published; `vmae weights inspect` says what a file is and what takes it."""

import argparse
import json
import os

import numpy as np
import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.catalogue import CATALOGUE, FORM, find_published
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.huggingface import save_pretrained
from vmae.checkpoint.inspection import inspect_weights, rows_of
from vmae.checkpoint.outline import TensorOutline, read_outline
from vmae.cli import main
from vmae.config import PRESETS

TINY = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)
COMMANDS = ["pretrain --init", "finetune --init", "evaluate, predict", "features, vmae.load", "reconstruct"]


def save(path, content):
    torch.save(content, path)
    return path


def prefixed(model, prefix):
    return {prefix + name: value for name, value in model.state_dict().items()}


def working(found):
    return [use.command for use in found.uses if use.works]


# --- the list ---


def test_the_catalogue_is_whole():
    assert len({weights.name for weights in CATALOGUE}) == len(CATALOGUE) > 30
    for weights in CATALOGUE:
        assert weights.model in (*PRESETS, None) and weights.get
        assert weights.get.startswith(("hub:", "Google Drive")) or weights.get == FORM
        if weights.get.startswith("hub:"):
            assert weights.get.count("/") >= 1 and weights.licence != ""
        assert (weights.top1 is None) == (weights.views is None)
    # From docs/MODEL_ZOO.md of the published code.
    scores = {weights.name: (weights.top1, weights.top5) for weights in CATALOGUE}
    assert scores["vit_g_hybrid_pt_1200e_k710_it_k400_ft.pth"] == (88.4, 98.0)
    assert scores["vit_b_k710_dl_from_giant.pth"] == (81.5, None)


def test_the_table_and_its_words(capsys):
    assert main(["weights"]) == 0
    text = capsys.readouterr().out
    assert "published, not verified here" in text
    assert all(weights.name in text and weights.get in text for weights in CATALOGUE)
    assert main(["weights", "VIT_B", "distilled"]) == 0
    text = capsys.readouterr().out
    assert "get: hub:OpenGVLab/VideoMAE2/distill/vit_b_k710_dl_from_giant.pth" in text and "vit_s" not in text
    assert main(["weights", "k710", "vit_g", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == [one.name for one in find_published(["k710", "vit_g"])]
    assert found[0]["top1"] == 83.8 and found[0]["top5"] == 96.4
    assert main(["weights", "vit_z"]) == 1
    assert "no published weights have the words vit_z" in capsys.readouterr().out


def test_the_list_needs_no_network(monkeypatch, capsys):
    monkeypatch.setattr("socket.socket.connect", None)
    monkeypatch.setattr("socket.getaddrinfo", None)
    assert main(["weights", "k710"]) == 0 and "hub:" in capsys.readouterr().out


# --- what a file is ---


def test_a_file_of_the_published_trainer(tmp_path, capsys):
    args = argparse.Namespace(lr=6e-4, epochs=800, num_frames=4, input_size=32, decoder_mask_type="run_cell")
    content = {
        "model": prefixed(build_pretrainer(TINY), "_orig_mod."),
        "optimizer": {"param_groups": [{"lr": 3e-4}, {"lr": 1e-4}], "state": {}},
        "epoch": 7,
        "args": args,
    }
    path = save(tmp_path / "checkpoint-7.pth", content)
    assert main(["weights", "inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for line in (
        "file of the published trainer (VideoMAE V2): pre-trained weights",
        "torch zip, under model: 88 tensors (88 float32)",
        "optimizer: state of an optimizer, learning rate 0.0003",
        "epoch: 7",
        "lr 0.0006",
        "decoder_mask_type run_cell",
        "fits vit_tiny",
        "tensors: 88 renamed",
        "_orig_mod.encoder.blocks.0-3.attn.qkv.weight [384, 128] float32 -> renamed to encoder.blocks.0-3",
        "_orig_mod.mask_token [1, 1, 64] float32 -> renamed to mask_token; finetune, features: dropped (deco",
    ):
        assert line in text
    found = inspect_weights(path)
    assert working(found) == ["pretrain --init", "finetune --init", "features, vmae.load", "reconstruct"]
    assert found.place == "model" and found.parameters == sum(v.numel() for v in content["model"].values())


def test_what_inspect_says_is_what_the_commands_do(tmp_path):
    """The same reports, from the same code."""
    from vmae.checkpoint.models import to_model
    from vmae.checkpoint.source import read_checkpoint

    export_weights(tmp_path / "w.pth", build_pretrainer(TINY).state_dict(), config={"model": TINY.to_dict()})
    found = {use.command: use.why for use in inspect_weights(tmp_path / "w.pth").uses}
    source = read_checkpoint(tmp_path / "w.pth")
    for command, kind in (("features, vmae.load", "encoder"), ("reconstruct", "pretrainer")):
        assert f"{tmp_path / 'w.pth'}: {found[command]}" == to_model(source, kind)[1]


def test_a_distilled_classifier_in_half_precision(tmp_path):
    classifier = build_classifier(TINY, 710).half()
    found = inspect_weights(save(tmp_path / "w.pth", {"module": classifier.state_dict()}))
    assert found.what.endswith("a classifier of 710 classes (as Kinetics-710 has)")
    assert found.place == "module" and found.dtypes == {"float16": 58}
    assert working(found) == ["finetune --init", "evaluate, predict", "features, vmae.load"]
    assert {key.fate for key in found.keys} == {"loaded"} and not found.missing
    head = next(key for key in found.keys if key.name == "head.weight")
    assert head.shape == (710, 128) and head.detail == "finetune, features: dropped (head)"


def test_weights_of_a_run(tmp_path, capsys):
    settings = {"model": TINY.to_dict(), "num_classes": 3}
    export_weights(tmp_path / "w.safetensors", build_classifier(TINY, 3).state_dict(), config=settings)
    found = inspect_weights(tmp_path / "w.safetensors")
    assert found.what == "weights of this code: a classifier of 3 classes" and found.format == "safetensors"
    assert found.config == TINY
    assert main(["weights", "inspect", "--keys", str(tmp_path / "w.safetensors"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["keys"]) == values["tensors"] == 58 and values["uses"][2]["works"] is True
    assert main(["weights", "inspect", "--keys", str(tmp_path / "w.safetensors")]) == 0
    assert "blocks.3.mlp.fc2.bias [128] float32 -> loaded\n" in capsys.readouterr().out


@pytest.mark.parametrize("build", [build_pretrainer, lambda config: build_classifier(config, 3)])
def test_a_folder_of_transformers(tmp_path, build):
    model = build(TINY)
    save_pretrained(model, tmp_path)
    found = inspect_weights(tmp_path)
    assert found.what.startswith("folder of transformers (VideoMAE): ")
    assert {key.fate for key in found.keys} <= {"renamed", "converted", "loaded"}
    details = {key.name: (key.fate, key.detail) for key in found.keys}
    layer, prefix = "videomae.encoder.layer.1.", "encoder." if build is build_pretrainer else ""
    joined = ("converted", f"joined into {prefix}blocks.1.attn.qkv.weight")
    assert details[f"{layer}attention.attention.key.weight"] == joined
    assert details[f"{layer}layernorm_after.bias"] == ("renamed", f"to {prefix}blocks.1.norm2.bias")
    assert details[f"{layer}attention.attention.q_bias"] == ("renamed", f"to {prefix}blocks.1.attn.q_bias")


def test_an_encoder_alone_and_a_fixed_table(tmp_path):
    encoder = build_classifier(TINY, 0)
    state = {**encoder.state_dict(), "pos_embed": encoder.pos_embed.clone()}
    found = inspect_weights(save(tmp_path / "w.pth", state), preset="vit_tiny", frames=4, size=32)
    assert found.place == "" and found.what == "weights under published names: an encoder without a head"
    table = next(key for key in found.keys if key.name == "pos_embed")
    assert (table.fate, table.detail) == ("dropped", "fixed positions, made again")
    assert working(found) == ["finetune --init", "features, vmae.load"]
    state.pop("fc_norm.bias")
    state["blocks.0.attn.gate"] = torch.ones(2)
    found = inspect_weights(save(tmp_path / "w.pth", state), preset="vit_tiny", frames=4, size=32)
    assert found.missing == ("fc_norm.bias",) and not working(found)
    strange = next(key for key in found.keys if key.name == "blocks.0.attn.gate")
    assert (strange.fate, strange.detail) == ("unknown", "not in the model")
    assert "missing in the file (1): fc_norm.bias" in found.uses[3].why


def test_misfits_have_reasons(tmp_path, capsys):
    config = ModelConfig(img_size=32, num_frames=4, embed_dim=48, depth=4, num_heads=3)
    path = save(tmp_path / "w.pth", build_classifier(config, 3).state_dict())
    assert main(["weights", "inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "fits no preset as it is; the nearest:" in text
    assert "vit_tiny: a width of 48 instead of 128" in text
    assert "unknown: no architecture fits" in text
    found = inspect_weights(path, preset="vit_tiny", frames=4, size=32)
    assert [use.works for use in found.uses] == [False] * 5
    norm = next(key for key in found.keys if key.name == "blocks.0.norm1.weight")
    assert (norm.fate, norm.detail) == ("unknown", "the model's has the shape [128]")
    assert [use.command for use in found.uses] == COMMANDS
    why = found.uses[1].why
    assert "it is of another architecture: shapes differ" in why and why.count("in the model") == 1


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00\x01\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "folder").mkdir()
    for name in ("text.pth", "empty.pth", "cut.safetensors", "folder", "none.pth"):
        assert main(["weights", "inspect", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and name in error and error.count("\n") == 1
    for words in (["inspect"], ["inspect", "a", "b"]):
        assert main(["weights", *words]) == 2
        assert "takes one file" in capsys.readouterr().err


# --- outlines ---


@pytest.mark.parametrize("zipped", [True, False])
def test_an_outline_holds_names_and_no_tensors(tmp_path, zipped):
    content = {
        "model": {"a.weight": torch.ones(3, 2).half(), "b": torch.nn.Parameter(torch.ones(4).bfloat16())},
        "lr": np.float64(0.25),
        "step": np.int64(7),
        "args": argparse.Namespace(lr=np.float32(1.5), names=["x"]),
        "scaler": {"scale": 2.0},
    }
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_outline(path)
    assert found.tensors == {
        "model": {"a.weight": TensorOutline((3, 2), "float16"), "b": TensorOutline((4,), "bfloat16")}
    }
    assert found.beside == {
        "lr": 0.25,
        "step": 7,
        "args": {"lr": 1.5, "names": ["x"]},
        "scaler": {"scale": 2.0},
    }
    assert "argparse.Namespace" in found.classes and found.tensors["model"]["a.weight"].bytes == 12


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_an_outline_runs_nothing(tmp_path, capsys):
    target = tmp_path / "made"
    path = save(tmp_path / "w.pth", {"model": {"a": torch.ones(1)}, "x": _Runs(str(target))})
    assert any("mkdir" in name for name in read_outline(path).classes) and not target.exists()
    assert main(["weights", "inspect", str(path)]) == 2  # as any command that loads it
    assert "w.pth" in capsys.readouterr().err and not target.exists()


def test_an_outline_ends(tmp_path):
    """Lists of lists in few bytes, and a list that holds itself."""
    bomb: list = []
    for _ in range(11):
        bomb = [bomb] * 10
    with pytest.raises(InputError, match="holds more values than weights have"):
        read_outline(save(tmp_path / "w.pth", {"a": torch.ones(1), "x": bomb}))
    own: list = []
    own.append(own)
    assert read_outline(save(tmp_path / "w.pth", {"a": torch.ones(1), "x": own})).tensors[""]


def test_rows_name_their_blocks(tmp_path):
    keys = inspect_weights(save(tmp_path / "w.pth", build_classifier(TINY, 2).state_dict())).keys
    names = [row.name for row in rows_of(key for key in keys if key.name != "blocks.2.norm1.bias")]
    assert "blocks.0-1,3.norm1.bias" in names and "blocks.0-3.norm1.weight" in names and "head.bias" in names
