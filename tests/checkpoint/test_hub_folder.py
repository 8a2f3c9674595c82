"""Folders of the Hugging Face hub: VideoMAEv2 encoders, the bare VideoMAEModel, weights in several files, and
a config.json that lies about the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint import huggingface as hf
from vmae.checkpoint import kind_of, read_checkpoint, to_model
from vmae.checkpoint.start import start_classifier
from vmae.cli import main

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

TINY = ModelConfig(img_size=32, num_frames=4, embed_dim=24, depth=2, num_heads=2)
# The published giant's shape, small: patches of 14 and an MLP ratio of 48 / 11.
GIANT = ModelConfig(
    img_size=28, patch_size=14, num_frames=4, embed_dim=88, depth=1, num_heads=4, mlp_ratio=48 / 11
)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clips(config: ModelConfig) -> torch.Tensor:
    """Normalised [B, 3, T, H, W], as the remote code takes them."""
    return torch.randn(2, 3, config.num_frames, *config.image_hw, generator=torch.Generator().manual_seed(1))


def v2_config(config: ModelConfig, pooling: str = "mean", **changes) -> dict:
    """`config.json` of VideoMAEv2-Base, with the keys that it has on the hub."""
    arch = {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "in_chans": 3,
        "num_classes": 0,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "qk_scale": None,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": 0.1,
        "norm_layer": "nn.LayerNorm",
        "layer_norm_eps": 1e-6,
        "init_values": config.init_values,
        "use_learnable_pos_emb": config.learned_pos,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet_size,
        "use_mean_pooling": pooling == "mean",
        "with_cp": False,
        "cos_attn": config.cos_attn,
    }
    return {
        "model_type": "VideoMAEv2_Base",
        "architectures": ["VideoMAEv2_Base"],
        "auto_map": {"AutoModel": "modeling_videomaev2.VideoMAEv2"},
        "model_config": {name: value for name, value in (arch | changes).items() if value != "absent"},
    }


def write_v2(folder: Path, model: torch.nn.Module, values: dict, prefix: str = "model.") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "modeling_videomaev2.py").write_text("raise SystemExit('executed')\n")
    save_file(
        {prefix + name: value for name, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


def encoder_of(folder: Path) -> torch.nn.Module:
    source = read_checkpoint(folder)
    assert kind_of(source) == "encoder"
    return to_model(source, "encoder")[0]


# --- VideoMAEv2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_videomaev2_folder_gives_our_own_embedding(tmp_path, pooling, prefix, caplog):
    """The remote code's forward is the published classifier's without a head: the pooled features."""
    model = randomised(build_classifier(TINY, 0, pooling=pooling))
    write_v2(tmp_path / "folder", model, v2_config(TINY, pooling), prefix)
    own = encoder_of(tmp_path / "folder")
    assert own.pooling == pooling and own.config == TINY
    with torch.no_grad():
        torch.testing.assert_close(own.features(clips(TINY)), model(clips(TINY)), rtol=0, atol=1e-5)
        assert own.features(clips(TINY)).shape == (2, 24)
    assert "auto_map names code of its own: not executed, nor needed" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        GIANT,
        TINY.replace(learned_pos=True),
        TINY.replace(init_values=0.1),
        TINY.replace(cos_attn=True),
        TINY.replace(qkv_bias=False),
        TINY.replace(img_size=(32, 48)),
    ],
)
def test_videomaev2_folders_of_other_shapes(tmp_path, config):
    model = randomised(build_classifier(config, 0))
    own = encoder_of(write_v2(tmp_path / "folder", model, v2_config(config)))
    with torch.no_grad():
        torch.testing.assert_close(own.features(clips(config)), model(clips(config)), rtol=0, atol=1e-5)


def test_what_a_videomaev2_config_leaves_out_is_taken_from_the_weights(tmp_path):
    """`all_frames` is the published name of `num_frames`; a fine-tuned one may have a head."""
    model = randomised(build_classifier(TINY, 3))
    values = v2_config(
        TINY, num_classes=3, all_frames=4, num_frames="absent", mlp_ratio="absent", depth="absent"
    )
    values |= {"id2label": {"0": "a", "1": "b", "2": "c"}}
    source = read_checkpoint(write_v2(tmp_path / "folder", model, values))
    assert source.config == TINY and source.settings["class_names"] == ["a", "b", "c"]
    own = to_model(source, "classifier")[0]
    with torch.no_grad():
        assert torch.equal(own(clips(TINY)), model(clips(TINY)))


def test_a_videomaev2_folder_starts_a_classifier(tmp_path):
    model = randomised(build_classifier(TINY, 0))
    source = read_checkpoint(write_v2(tmp_path / "folder", model, v2_config(TINY)))
    new = build_classifier(TINY, 5)
    report = start_classifier(new, source.path, grid=source.grid, state=source.state)
    assert report.fresh == ["head.weight", "head.bias"] and not report.dropped
    assert torch.equal(new.fc_norm.weight, model.fc_norm.weight)


def test_convert_writes_a_videomaev2_folder_as_a_file(tmp_path):
    model = randomised(build_classifier(TINY, 0))
    folder = write_v2(tmp_path / "folder", model, v2_config(TINY))
    assert main(["convert", str(folder), str(tmp_path / "out.pth")]) == 0
    state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert state.keys() == model.state_dict().keys()


# --- transformers' bare model and several files -------------------------------------------------------------


def write_bare(folder: Path, model: torch.nn.Module, pooling: str, prefix: str = "") -> Path:
    hf.save_pretrained(model, folder)
    state = load_file(folder / "model.safetensors")
    state = {
        prefix + name.removeprefix("videomae."): value.contiguous()
        for name, value in state.items()
        if name.startswith("videomae.")
    }
    save_file(state, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    values |= {"architectures": ["VideoMAEModel"], "use_mean_pooling": pooling == "mean"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("prefix", ["", "videomae."])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_the_bare_model(tmp_path, pooling, prefix):
    model = randomised(build_classifier(TINY, 3, pooling=pooling))
    folder = write_bare(tmp_path / "folder", model, pooling, prefix)
    own = encoder_of(folder)
    with torch.no_grad():
        torch.testing.assert_close(own.tokens(clips(TINY)), model.tokens(clips(TINY)), rtol=0, atol=1e-5)
    source = read_checkpoint(folder)
    report = start_classifier(build_classifier(TINY, 5), source.path, grid=source.grid, state=source.state)
    assert sorted({name.split(".")[0] for name in report.fresh}) == ["fc_norm", "head"]


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_the_bare_model_of_transformers_gives_the_same_tokens(tmp_path, pooling):
    transformers = pytest.importorskip("transformers")
    model = randomised(build_classifier(TINY, 3, pooling=pooling))
    hf.save_pretrained(model, tmp_path / "whole")
    theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / "whole").eval()
    theirs.save_pretrained(tmp_path / "bare")
    with torch.no_grad():
        expected = theirs(clips(TINY).transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(
            encoder_of(tmp_path / "bare").tokens(clips(TINY)), expected, rtol=0, atol=1e-5
        )


def shard(folder: Path, kind: str = "model.safetensors") -> dict[str, str]:
    """The weights of a folder in two files and an index; returns which tensor is where."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    stem, suffix = kind.split(".")
    where = {}
    for part, own in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{part}-of-00002.{suffix}"
        where |= dict.fromkeys(own, file)
        content = {name: state[name].clone() for name in own}
        (save_file if suffix == "safetensors" else torch.save)(content, folder / file)
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files(tmp_path, kind):
    model = randomised(build_classifier(TINY, 3))
    hf.save_pretrained(model, tmp_path, list("abc"))
    shard(tmp_path, kind)
    own = to_model(read_checkpoint(tmp_path), "classifier")[0]
    with torch.no_grad():
        assert torch.equal(own(clips(TINY)), model(clips(TINY)))


def line_of(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(InputError) as caught:
        to_model(read_checkpoint(folder), "encoder")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "../secret.safetensors",
            "'../secret.safetensors', which is no file of weights in its own folder: refused",
        ),
        ("/etc/x.safetensors", "which is no file of weights in its own folder"),
        ("a\\..\\x.safetensors", "which is no file of weights in its own folder"),
        ("c:x.safetensors", "which is no file of weights in its own folder"),
        ("sub/x.safetensors", "which is no file of weights in its own folder"),
        ("modeling.py", "which is no file of weights in its own folder"),
        (7, "names 7, which is no file of weights"),
        (None, "names None, which is no file of weights"),
        (
            "gone.safetensors",
            "gone.safetensors missing, 1 of the 3 files that model.safetensors.index.json names",
        ),
    ],
)
def test_an_index_that_names_other_files(tmp_path, name, message):
    folder = tmp_path / "folder"
    hf.save_pretrained(build_classifier(TINY, 3), folder)
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    where = shard(folder)
    where["classifier.bias"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert message in line_of(folder)


def test_broken_folders_of_several_files(tmp_path):
    hf.save_pretrained(build_classifier(TINY, 3), tmp_path)
    where = shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    first = tmp_path / where["classifier.bias"]
    index.write_text(json.dumps({"weight_map": where | {"more.weight": where["classifier.bias"]}}))
    assert "names 1 tensors that are in none of its files: more.weight" in line_of(tmp_path)
    for text in (
        "{}",
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "{",
        "version https://git-lfs.github.com/spec/v1",
    ):
        index.write_text(text)
        assert str(index) in line_of(tmp_path)
    index.write_text(json.dumps({"weight_map": where}))
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    assert f"{first} cannot be read" in line_of(tmp_path)
    first.write_text(POINTER)
    assert f"{first} is a pointer of git LFS, not the file of 44.3 MB itself" in line_of(tmp_path)
    other = next(path for path in tmp_path.glob("*.safetensors") if path != first)
    save_file({**load_file(other), "classifier.bias": torch.ones(3)}, other)
    first.write_bytes(whole)
    assert "classifier.bias is in another file of model.safetensors.index.json too" in line_of(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 44300000\n"


def test_half_a_file_pointers_and_nothing(tmp_path):
    write_v2(tmp_path, build_classifier(TINY, 0), v2_config(TINY))
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for count in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:count])
        assert f"{weights} cannot be read" in line_of(tmp_path)
    weights.write_text(POINTER)
    assert f"{weights} is a pointer of git LFS" in line_of(tmp_path)
    (tmp_path / "plain.pth").write_text(POINTER)
    assert "a pointer of git LFS instead of the weights: `git lfs pull`" in line_of(tmp_path / "plain.pth")
    weights.unlink()
    line = line_of(tmp_path)
    assert "holds none of model.safetensors, pytorch_model.bin" in line and "it holds config.json" in line
    (tmp_path / "config.json").write_text(POINTER)
    assert "config.json is a pointer of git LFS" in line_of(tmp_path)


# --- a config.json that lies --------------------------------------------------------------------------------

NO_NUMBERS = ["24", None, [24], {"a": 1}, True, float("nan"), float("inf"), -1, 0, 24.5, 10**400]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 48}, "embed_dim is 48, the weights show 24"),
        ({"depth": 3}, "depth is 3, the weights show 2"),
        ({"depth": 1}, "depth is 1, the weights show 2"),
        ({"num_heads": 5}, "embed_dim is 24, which num_heads 5 does not divide"),
        ({"patch_size": 8}, "patch_size is 8, the weights show 16"),
        ({"tubelet_size": 4}, "tubelet_size is 4, the weights show 2"),
        ({"in_chans": 1}, "in_chans is 1, the weights show 3"),
        ({"img_size": 33}, "img_size is 33, which patch_size 16 does not divide"),
        ({"num_frames": 5}, "num_frames is 5, which tubelet_size 2 does not divide"),
        ({"all_frames": 8}, "num_frames is 4, but all_frames is 8"),
        ({"mlp_ratio": 3}, "mlp_ratio is 3.0, 72 hidden numbers of 24; the weights show 96"),
        ({"mlp_ratio": "4"}, 'mlp_ratio is "4", no number'),
        ({"qkv_bias": False}, "qkv_bias is false, the weights show true"),
        ({"qkv_bias": "yes"}, 'qkv_bias is "yes", neither true nor false; the weights show true'),
        ({"cos_attn": True}, "cos_attn is true, the weights show false"),
        ({"init_values": 0.1}, "init_values is 0.1, the weights show no gamma_1"),
        ({"init_values": [1]}, "init_values is [1], no number"),
        ({"use_learnable_pos_emb": True}, "use_learnable_pos_emb is true, the weights show no pos_embed"),
        (
            {"use_mean_pooling": False},
            "use_mean_pooling is false, which wants norm; the weights show fc_norm",
        ),
        ({"num_classes": 710}, "num_classes is 710, the weights show 0"),
        ({"num_classes": -1}, "num_classes is -1, no whole number of at least 0; the weights show 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is NaN, no number"),
        ({"layer_norm_eps": 7}, "layer_norm_eps"),
        ({"qk_scale": "x"}, 'qk_scale is "x", no number'),
        ({"norm_layer": "RMSNorm"}, 'norm_layer is "RMSNorm", only LayerNorm is supported'),
        ({"rope": True}, "rope is true, an argument that is not known here"),
        ({"img_size": [32, 32, 32]}, "img_size is [32, 32, 32], no whole number"),
        ({"img_size": [0, 32]}, "img_size is [0, 32], no size"),
        ({"num_frames": 10**9}, "num_frames"),
        *[({"embed_dim": value}, "embed_dim is ") for value in NO_NUMBERS],
        *[({"num_frames": value}, "num_frames is ") for value in NO_NUMBERS if value != 10**400],
    ],
)
def test_a_videomaev2_config_that_lies(tmp_path, changes, message):
    folder = write_v2(tmp_path / "f", build_classifier(TINY, 0), v2_config(TINY, **changes))
    line = line_of(folder)
    assert line.startswith(f"{folder / 'config.json'}: ") and message in line and len(line) < 400


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_a_videomaev2_config_without_arguments(tmp_path, value):
    values = {**v2_config(TINY), "model_config": value}
    folder = write_v2(tmp_path / "f", build_classifier(TINY, 0), values)
    assert f"model_config is {json.dumps(value)}, no JSON object" in line_of(folder)


def test_a_videomaev2_config_beside_other_weights(tmp_path):
    folder = write_v2(tmp_path / "f", torch.nn.Linear(2, 2), v2_config(TINY))
    assert "the weights beside it show no patch_embed.proj.weight but bias, weight" in line_of(folder)
    model = build_classifier(TINY.replace(learned_pos=True), 0)
    values = v2_config(TINY, use_learnable_pos_emb=True, num_frames=8)
    folder = write_v2(tmp_path / "g", model, values)
    assert "num_frames 8 and img_size 32 make 16 positions, the weights show 8" in line_of(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "hidden_size is 48, the weights show 24"),
        ({"hidden_size": None}, "hidden_size is null, no whole number of at least 1; the weights show 24"),
        ({"num_hidden_layers": 12}, "num_hidden_layers is 12, the weights show 2"),
        ({"num_attention_heads": 5}, "hidden_size is 24, which num_attention_heads 5 does not divide"),
        ({"num_attention_heads": "2"}, 'num_attention_heads is "2", no whole number'),
        ({"intermediate_size": 100}, "intermediate_size is 100, the weights show 96"),
        ({"patch_size": 8}, "patch_size is 8, the weights show 16"),
        ({"tubelet_size": 1}, "tubelet_size is 1, the weights show 2"),
        ({"image_size": 40}, "image_size is 40, which patch_size 16 does not divide"),
        ({"image_size": None}, "image_size is null, no whole number"),
        ({"num_frames": 3}, "num_frames is 3, which tubelet_size 2 does not divide"),
        ({"num_frames": 8}, "num_frames 8 and image_size 32 make 16 positions, the weights show 8"),
        ({"num_frames": []}, "num_frames is [], no whole number"),
        ({"qkv_bias": False}, "qkv_bias is false, the weights show true"),
        ({"layer_norm_eps": "small"}, 'layer_norm_eps is "small", no number'),
        ({"use_mean_pooling": False}, "use_mean_pooling is false, the weights show fc_norm"),
        ({"use_mean_pooling": "no"}, 'use_mean_pooling is "no", neither true nor false'),
        ({"id2label": {"0": "a"}}, "id2label names 1 classes, the weights show 3"),
        ({"id2label": [1, 2]}, "id2label does not name the classes"),
        ({"architectures": ["VideoMAEForPreTraining"]}, "the weights show VideoMAEForVideoClassification"),
        ({"architectures": ["TimesformerModel"]}, 'architectures names "TimesformerModel"'),
        ({"architectures": {"a": 1}}, "architectures names"),
        ({"model_type": "vivit"}, "model_type is 'vivit', not 'videomae'"),
        ({"model_type": ["videomae"]}, "model_type is ['videomae'], not 'videomae'"),
        ({"hidden_act": ["gelu"]}, "hidden_act is ['gelu']; only 'gelu' is supported"),
        ({"num_channels": 4}, "num_channels is 4; only 3 is supported"),
        ({"decoder_hidden_size": "x"}, 'decoder_hidden_size is "x", no whole number'),
    ],
)
def test_a_transformers_config_that_lies(tmp_path, changes, message):
    hf.save_pretrained(build_classifier(TINY, 3), tmp_path, list("abc"))
    weights = load_file(tmp_path / "model.safetensors")
    weights["videomae.embeddings.position_embeddings"] = torch.zeros(1, 8, 24)
    save_file(weights, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).config.num_frames == 4
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    line = line_of(tmp_path)
    assert line.startswith(f"{file}: ") and message in line and len(line) < 400


def test_a_pretrained_config_that_lies_about_its_decoder(tmp_path):
    config = TINY.replace(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    hf.save_pretrained(build_pretrainer(config), tmp_path)
    file = tmp_path / "config.json"
    true = json.loads(file.read_text())
    for changes, message in (
        (
            {"decoder_hidden_size": 32, "decoder_intermediate_size": 128},
            "decoder_hidden_size is 32, the weights show 16",
        ),
        ({"decoder_num_hidden_layers": 2}, "decoder_num_hidden_layers is 2, the weights show 1"),
        (
            {"decoder_num_attention_heads": 3},
            "decoder_hidden_size is 16, which decoder_num_attention_heads 3",
        ),
        ({"decoder_intermediate_size": 60}, "decoder_intermediate_size is 60, the weights show 64"),
        ({"norm_pix_loss": "yes"}, 'norm_pix_loss is "yes", neither true nor false'),
    ):
        file.write_text(json.dumps(true | changes))
        assert message in line_of(tmp_path)


def test_other_means_than_imagenets_are_said(tmp_path, caplog):
    hf.save_pretrained(build_classifier(TINY, 3), tmp_path)
    read_checkpoint(tmp_path)
    assert "image_mean" not in caplog.text
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    read_checkpoint(tmp_path)
    assert "image_mean is [0.5, 0.5, 0.5]; here it is ImageNet's, [0.485, 0.456, 0.406]" in caplog.text
