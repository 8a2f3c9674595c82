"""Weights to and from transformers: names and numbers without the package, results with it."""

import json

import pytest
import torch

from vmae import DualMask, InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint import huggingface as hf
from vmae.checkpoint import kind_of, read_checkpoint, to_model
from vmae.checkpoint.published import load_weights
from vmae.cli import main

PRESETS = ("vit_s", "vit_b", "vit_l", "vit_h", "vit_g")


def randomised(model):
    """Numbers other than the initial ones everywhere: zero biases and unit norms hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load(folder):
    source = read_checkpoint(folder)
    return to_model(source, kind_of(source))[0]


def test_both_ways_are_a_fixed_point(tiny):
    for model, kind in (
        (build_pretrainer(tiny), hf.PRETRAINING),
        (build_classifier(tiny, 5), hf.CLASSIFICATION),
        (build_classifier(tiny, 5, pooling="first"), hf.CLASSIFICATION),
    ):
        state = randomised(model).state_dict()
        there = hf.to_huggingface(state, kind)
        assert equal(hf.from_huggingface(there, kind), state)
        assert equal(hf.to_huggingface(hf.from_huggingface(there, kind), kind), there)


def test_biases_have_the_names_of_every_release(tiny):
    """Old and new names are written; either is read, and the biases of keys that some releases save have no
    effect."""
    model = randomised(build_classifier(tiny, 5))
    there = hf.to_huggingface(model.state_dict(), hf.CLASSIFICATION)
    old = {name: value for name, value in there.items() if not name.endswith(("query.bias", "value.bias"))}
    new = {name: value for name, value in there.items() if not name.endswith(("q_bias", "v_bias"))}
    assert len(there) - len(old) == len(there) - len(new) == 2 * tiny.depth
    layer = "videomae.encoder.layer.1.attention.attention."
    for name in ("query", "value"):
        assert torch.equal(there[f"{layer}{name}.bias"], model.state_dict()[f"blocks.1.attn.{name[0]}_bias"])
    with_keys = {**new, f"{layer}key.bias": torch.randn(tiny.embed_dim)}
    for state in (old, new, with_keys):
        assert equal(hf.from_huggingface(state, hf.CLASSIFICATION), model.state_dict())
    with pytest.raises(
        InputError, match="layer.1.attention.attention.v_bias and its other name .* hold different numbers"
    ):
        hf.from_huggingface({**there, f"{layer}value.bias": torch.zeros(tiny.embed_dim)}, hf.CLASSIFICATION)


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_and_names_of_every_preset(preset):
    config = ModelConfig.preset(preset)
    values = hf.config_to_huggingface(config, hf.PRETRAINING)
    back = hf.config_from_huggingface(json.loads(json.dumps(values)))
    assert hf.config_to_huggingface(back, hf.PRETRAINING) == values
    assert int(back.embed_dim * back.mlp_ratio) == int(config.embed_dim * config.mlp_ratio)
    assert back.replace(mlp_ratio=config.mlp_ratio) == config
    with torch.device("meta"):
        state, again = build_pretrainer(config).state_dict(), build_pretrainer(back).state_dict()
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in again.items()}
    back_and_forth = hf.from_huggingface(hf.to_huggingface(state, hf.PRETRAINING), hf.PRETRAINING)
    assert {n: v.shape for n, v in back_and_forth.items()} == {n: v.shape for n, v in state.items()}
    with torch.device("meta"):
        state = build_classifier(config, 400).state_dict()
    there = hf.to_huggingface(state, hf.CLASSIFICATION)
    again = hf.from_huggingface(there, hf.CLASSIFICATION)
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in state.items()}
    assert hf.to_huggingface(again, hf.CLASSIFICATION).keys() == there.keys()


def test_what_cannot_be_expressed_is_refused(tiny):
    for setting in ({"learned_pos": True}, {"cos_attn": True}, {"init_values": 0.1}, {"qk_scale": 0.5}):
        with pytest.raises(InputError, match=f"cannot express {next(iter(setting))}"):
            hf.config_to_huggingface(tiny.replace(**setting), hf.PRETRAINING)
    with pytest.raises(InputError, match="no place for blocks.0.gamma_1"):
        hf.to_huggingface({"blocks.0.gamma_1": torch.ones(1)}, hf.CLASSIFICATION)
    with pytest.raises(InputError, match="not tensors of VideoMAEForPreTraining: classifier.weight"):
        hf.from_huggingface({"classifier.weight": torch.ones(1)}, hf.PRETRAINING)
    one = {"videomae.encoder.layer.0.attention.attention.query.weight": torch.ones(2, 2)}
    with pytest.raises(InputError, match="only attention.attention.query.weight of query, key and value"):
        hf.from_huggingface(one, hf.PRETRAINING)
    for wrong in ({"model_type": "vit"}, {"model_type": "videomae", "hidden_act": "relu"}):
        with pytest.raises(InputError, match="model_type is 'vit'|hidden_act is 'relu'"):
            hf.config_from_huggingface(wrong)


def test_folders(tiny, tmp_path, clips_of):
    model = randomised(build_classifier(tiny, 3))
    hf.save_pretrained(model, tmp_path / "folder", ["a", "b", "c"])
    again = load(tmp_path / "folder")
    assert equal(again.state_dict(), model.state_dict())
    assert hf.read_pretrained(tmp_path / "folder")[0]["class_names"] == ["a", "b", "c"]
    assert torch.equal(again(clips_of(tiny)), model(clips_of(tiny)))
    processor = json.loads((tmp_path / "folder" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 64, "width": 64} and processor["image_mean"][0] == 0.485


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "config.json",
            {"id2label": {"7": "a", "8": "b", "9": "c"}},
            "does not name the classes from 0 on",
        ),
        ("config.json", None, "cannot be read"),
        ("config.json", "{", "is no JSON"),
        ("config.json", "[]", "holds no JSON object"),
        (
            "config.json",
            {"architectures": ["VideoMAEModel"]},
            "architectures names VideoMAEModel, the weights show VideoMAEForVideoClassification",
        ),
        ("model.safetensors", None, "holds none of"),
        ("model.safetensors", "x", "cannot be read"),
    ],
)
def test_bad_folders(tiny, tmp_path, file, text, message):
    hf.save_pretrained(build_classifier(tiny, 3), tmp_path)
    if isinstance(text, dict):
        text = json.dumps(json.loads((tmp_path / file).read_text()) | text)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        hf.read_pretrained(tmp_path)


def test_the_command(tiny, tmp_path, capsys):
    model = randomised(build_pretrainer(tiny))
    hf.save_pretrained(model, tmp_path / "there")
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "here.pth")]) == 0
    assert equal(load_weights(tmp_path / "here.pth"), model.state_dict())
    assert main(["convert", str(tmp_path / "here.pth"), str(tmp_path / "again")]) == 0
    assert equal(load(tmp_path / "again").state_dict(), model.state_dict())
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pth")
    assert main(["convert", str(tmp_path / "plain.pth"), str(tmp_path / "x")]) == 2
    assert "give --model" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "plain.pth"), str(tmp_path / "x"), "--model", "vit_s"]) == 2
    assert "another architecture" in capsys.readouterr().err
    assert (
        main(["convert", str(tmp_path / "there"), str(tmp_path / "x.onnx")]) == 2
        and not (tmp_path / "x.onnx").exists()
    )


# --- with the package itself --------------------------------------------------------------------------------


def float_clips(config):
    """Normalised, as its processor gives them: [B, T, 3, H, W]."""
    return torch.randn(2, config.num_frames, 3, *config.image_hw, generator=torch.Generator().manual_seed(5))


def test_transformers_gives_the_same_logits(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    for pooling in ("mean", "first"):
        model = randomised(build_classifier(tiny, 5, pooling=pooling))
        hf.save_pretrained(model, tmp_path / pooling, list("abcde"))
        theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / pooling).eval()
        assert theirs.config.id2label[4] == "e"
        biases = [
            p
            for name, p in theirs.named_parameters()
            if name.endswith(("q_bias", "query.bias", "value.bias", "v_bias"))
        ]
        assert len(biases) == 2 * tiny.depth and all(bias.abs().max() > 0.01 for bias in biases)
        clips = float_clips(tiny)
        with torch.no_grad():
            torch.testing.assert_close(model(clips.transpose(1, 2)), theirs(clips).logits, rtol=0, atol=1e-4)


def test_transformers_gives_the_same_pretraining_loss(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomised(build_pretrainer(tiny))
    hf.save_pretrained(model, tmp_path)
    theirs = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path).eval()
    generator = torch.Generator().manual_seed(0)
    mask = DualMask.sample(
        2, tiny.grid, encoder="tube", encoder_ratio=0.75, decoder="none", generator=generator
    )
    clips = float_clips(tiny)
    with torch.no_grad():
        ours, expected = model(clips.transpose(1, 2), mask), theirs(clips, mask.to_bool()[0])
        torch.testing.assert_close(
            model.predict(clips.transpose(1, 2), mask), expected.logits, rtol=0, atol=1e-4
        )
    assert ours.item() == pytest.approx(expected.loss.item(), rel=1e-4)


def test_what_transformers_saves_is_read(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomised(build_classifier(tiny, 5))
    hf.save_pretrained(model, tmp_path / "ours")
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert equal(load(tmp_path / "theirs").state_dict(), model.state_dict())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_with_one_block_gives_the_same_there(preset, tmp_path):
    """Logits and pre-training loss, at the preset's widths, heads, MLP ratio and patches."""
    transformers = pytest.importorskip("transformers")
    side = 4 * ModelConfig.preset(preset).patch_size
    config = ModelConfig.preset(preset, depth=1, decoder_depth=1, img_size=side, num_frames=4)
    clips, generator = float_clips(config), torch.Generator().manual_seed(0)
    mask = DualMask.sample(
        2, config.grid, encoder="tube", encoder_ratio=0.75, decoder="none", generator=generator
    )
    classifier, pretrainer = randomised(build_classifier(config, 7)), randomised(build_pretrainer(config))
    hf.save_pretrained(classifier, tmp_path / "classifier")
    hf.save_pretrained(pretrainer, tmp_path / "pretrainer")
    with torch.no_grad():
        theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "classifier").eval()
        torch.testing.assert_close(
            classifier(clips.transpose(1, 2)), theirs(clips).logits, rtol=1e-4, atol=1e-4
        )
        theirs = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "pretrainer").eval()
        expected = theirs(clips, mask.to_bool()[0]).loss.item()
        assert pretrainer(clips.transpose(1, 2), mask).item() == pytest.approx(expected, rel=1e-4)
    assert equal(load(tmp_path / "pretrainer").state_dict(), pretrainer.state_dict())
