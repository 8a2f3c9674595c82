"""Models come back with the frames, size, patches and positions that their weights are of, by every
loader."""

import argparse

import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.classifier import load_classifier
from vmae.checkpoint.folder import export_weights
from vmae.checkpoint.published import read_settings_and_weights
from vmae.checkpoint.source import at_size, read_checkpoint, source_config
from vmae.cli import main
from vmae.evaluate.detection import load_detector
from vmae.evaluate.encoder import load_encoder
from vmae.evaluate.reconstruct import load_model
from vmae.model.detector import build_detector
from vmae.tools.convert import load_own

TINY = ModelConfig.preset("vit_tiny", img_size=64, num_frames=8)
LEARNED = TINY.replace(learned_pos=True)
OWN, NONE = (8, 64), (None, None)


def randomised(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def official(path, model, wrapper="model", **arguments):
    """Weights and nothing else, or with the arguments of their training, as published files are."""
    torch.save(
        {wrapper: model.state_dict(), **({"args": argparse.Namespace(**arguments)} if arguments else {})},
        path,
    )
    return path


def size_of(model):
    return model.config.num_frames, model.config.img_size, model.config.pos_grid


# --- Files of `convert` ---


def test_a_converted_classifier_comes_back_at_its_own_size(tmp_path, clips_of, capsys):
    original = randomised(build_classifier(TINY, 3))
    about = {
        "model": TINY.to_dict(),
        "clip": {"num_frames": 8, "image_size": 64, "stride": 2},
        "multi_label": True,
    }
    export_weights(tmp_path / "run.pth", original.state_dict(), config=about)
    assert main(["convert", str(tmp_path / "run.pth"), str(tmp_path / "folder")]) == 0
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "back.pth")]) == 0
    loaded = load_classifier(tmp_path / "back.pth")
    assert size_of(loaded.model) == (8, 64, None) and (loaded.clip.num_frames, loaded.clip.image_size) == (
        8,
        64,
    )
    assert torch.equal(loaded.model(clips_of(TINY)), original(clips_of(TINY)))
    assert (
        len(loaded.assumed) == 1
        and "does not say how videos were seen, taken as dense sampling, stride 4, published pixels"
        in loaded.note
    )
    assert loaded.clip.resize == "published"  # as weights of the published trainer were trained
    assert loaded.multi_label and not load_classifier(tmp_path / "run.pth").assumed
    assert not load_classifier(tmp_path / "back.pth", clip={"stride": 2}).assumed
    # Asked for, another size is another matter.
    other = load_classifier(tmp_path / "back.pth", clip={"num_frames": 4, "image_size": 32})
    assert size_of(other.model) == (4, 32, (4, 4, 4)) and other.clip.image_size == 32
    assert size_of(load_encoder(tmp_path / "back.pth").model) == (8, 64, None)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_converted_pretrainer_keeps_size_and_target(tmp_path, normalize):
    model = build_pretrainer(TINY.replace(img_size=(32, 64)), normalize_target=normalize)
    about = {"model": model.config.to_dict(), "normalize_target": normalize}
    export_weights(tmp_path / "run.safetensors", model.state_dict(), config=about)
    assert main(["convert", str(tmp_path / "run.safetensors"), str(tmp_path / "folder")]) == 0
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "back.safetensors")]) == 0
    back, settings = load_model(tmp_path / "back.safetensors")
    assert (
        size_of(back) == (8, (32, 64), None)
        and back.normalize_target is normalize is settings["normalize_target"]
    )
    assert load_own(read_checkpoint(tmp_path / "back.safetensors")).normalize_target is normalize
    assert size_of(load_encoder(tmp_path / "back.safetensors").model) == (8, (32, 64), None)


def test_interpolated_positions_are_refused_by_convert(tmp_path, capsys):
    about = {"model": TINY.replace(pos_grid=(8, 14, 14)).to_dict()}
    export_weights(tmp_path / "run.pth", build_classifier(TINY, 3).state_dict(), config=about)
    assert main(["convert", str(tmp_path / "run.pth"), str(tmp_path / "folder")]) == 2
    assert "cannot express positions of a (8, 14, 14) grid (pos_grid)" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


# --- Published files ---


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_learned_positions_tell_the_size(tmp_path, clips_of, wrapper):
    """128 tokens: of 16 frames, 64 x 64 pixels."""
    config = LEARNED.replace(num_frames=16)
    original = randomised(build_classifier(config, 3))
    loaded = load_classifier(official(tmp_path / "w.pth", original, wrapper), preset="vit_tiny")
    assert (
        size_of(loaded.model) == (16, 64, None)
        and loaded.clip.image_size == 64
        and loaded.model.config.learned_pos
    )
    assert torch.equal(loaded.model(clips_of(config)), original(clips_of(config)))
    assert (
        "its 128 positions are taken as those of 16 frames of 64 pixels (--init-frames" in loaded.assumed[0]
    )


def test_learned_positions_with_one_number_given(tmp_path, clips_of):
    original = randomised(build_classifier(LEARNED, 3))
    path = official(tmp_path / "w.pth", original)
    with pytest.raises(
        InputError, match="64 positions, which are none of square clips of 16 frames or 224 pixels"
    ):
        load_classifier(path, preset="vit_tiny")
    for source in ((8, None), (None, 64), (8, 64)):
        loaded = load_classifier(path, preset="vit_tiny", source=source)
        assert size_of(loaded.model) == (8, 64, None) and torch.equal(
            loaded.model(clips_of(TINY)), original(clips_of(TINY))
        )
        assert any("its 64 positions are taken as" in line for line in loaded.assumed) == (None in source)
    for source in ((16, 64), (6, None), (None, 96), (None, 8)):
        with pytest.raises(InputError, match="64 positions, which are none of square clips of"):
            load_classifier(path, preset="vit_tiny", source=source)
    wide = ModelConfig.preset(
        "vit_tiny", num_frames=6, learned_pos=True
    )  # 588 tokens: not of 16 frames, but of 224 pixels
    state = {"pos_embed": torch.randn(1, wide.num_tokens, 128)}
    assert source_config({}, state, "w.pth", "vit_tiny")[0].replace(learned_pos=True) == wide


def test_fixed_positions_cannot_tell_and_that_is_said(tmp_path, clips_of, capsys):
    original = randomised(build_classifier(TINY, 3))
    path = official(tmp_path / "w.pth", original)
    loaded = load_classifier(path, preset="vit_tiny")
    assert size_of(loaded.model) == (16, 224, None)
    said = (
        "it does not say the frames and size of its clips, taken as 16 frames of 224 pixels (--init-frames "
        "and --init-size"
    )
    assert said in loaded.note
    own = load_classifier(path, preset="vit_tiny", source=OWN)
    assert size_of(own.model) == (8, 64, None) and torch.equal(
        own.model(clips_of(TINY)), original(clips_of(TINY))
    )
    assert "does not say the frames" not in own.note
    assert (
        "taken as 8 frames of 224 pixels" in load_classifier(path, preset="vit_tiny", source=(8, None)).note
    )


def test_the_arguments_of_a_published_training_tell(tmp_path, clips_of):
    original = randomised(build_classifier(TINY, 3))
    path = official(tmp_path / "w.pth", original, num_frames=8, input_size=64, num_segments=1, lr=1e-3)
    loaded = load_classifier(path, preset="vit_tiny")
    assert size_of(loaded.model) == (8, 64, None) and "does not say the frames" not in loaded.note
    assert torch.equal(loaded.model(clips_of(TINY)), original(clips_of(TINY)))
    assert size_of(load_classifier(path, preset="vit_tiny", source=(16, None)).model) == (16, 64, None)
    for strange in (dict(num_frames="8"), dict(input_size=-3), dict(num_frames=None), dict(lr=1)):
        settings, _ = read_settings_and_weights(official(tmp_path / "s.pth", original, **strange))
        assert settings == {}


def test_patches_and_tubelets_are_those_of_the_file(tmp_path, clips_of):
    config = TINY.replace(patch_size=8, tubelet_size=4, img_size=40)
    original = randomised(build_classifier(config, 3))
    loaded = load_classifier(official(tmp_path / "w.pth", original), preset="vit_tiny", source=(8, 40))
    assert torch.equal(loaded.model(clips_of(config)), original(clips_of(config)))


def test_every_loader_gives_the_size_of_a_published_file(tmp_path, capsys):
    """Fixed positions with the caller's word, learned ones by themselves, none dropped."""
    for config in (TINY, LEARNED):
        sizes = OWN if config is TINY else (8, None)
        classifier, pretrainer = build_classifier(config, 3), build_pretrainer(config)
        path, pre = official(tmp_path / "c.pth", classifier), official(tmp_path / "p.pth", pretrainer)
        found = [
            load_classifier(path, preset="vit_tiny", source=sizes).model,
            load_encoder(path, preset="vit_tiny", source=sizes).model,
            load_encoder(pre, preset="vit_tiny", source=sizes).model,
            load_model(pre, preset="vit_tiny", source=sizes)[0],
            load_own(read_checkpoint(path, preset="vit_tiny", frames=sizes[0], size=sizes[1])),
            load_own(read_checkpoint(pre, preset="vit_tiny", frames=sizes[0], size=sizes[1])),
        ]
        detector = official(tmp_path / "d.pth", build_detector(config, 3))
        loaded = load_detector(detector, preset="vit_tiny", source=sizes, actions={1: "a"})
        assert (loaded.clip.num_frames, loaded.clip.image_size) == (8, 64)
        for model in (*found, loaded.model):
            assert size_of(model) == (8, 64, None) and model.config.learned_pos == config.learned_pos
    capsys.readouterr()
    assert (
        main(
            [
                "convert",
                str(tmp_path / "c.pth"),
                str(tmp_path / "x"),
                "--model",
                "vit_tiny",
                "--num-frames",
                "8",
            ]
        )
        == 2
    )
    assert "cannot express learned_pos" in capsys.readouterr().err


def test_notes_reach_the_user(tmp_path, capsys):
    official(tmp_path / "p.pth", build_pretrainer(TINY))
    load_model(tmp_path / "p.pth", preset="vit_tiny")
    assert "taken as 16 frames of 224 pixels" in capsys.readouterr().out
    official(tmp_path / "c.pth", build_classifier(TINY, 3))
    assert (
        main(
            [
                "convert",
                str(tmp_path / "c.pth"),
                str(tmp_path / "x"),
                "--model",
                "vit_tiny",
                "--num-frames",
                "8",
            ]
        )
        == 0
    )
    assert (
        "taken as 8 frames of 224 pixels (--num-frames and --image-size say otherwise)"
        in capsys.readouterr().out
    )


# --- What files say of themselves ---


def test_a_files_own_word_counts():
    settings = {"model": TINY.to_dict()}
    assert (
        source_config(settings, {}, "w.pth")
        == (TINY, "")
        == source_config(settings, {}, "w.pth", "vit_b", *OWN)
    )
    with pytest.raises(
        InputError, match="says that its weights are of 8 frames of 64 x 64 pixels, not of 96 pixels"
    ):
        source_config(settings, {}, "w.pth", None, None, 96)
    resized = TINY.replace(pos_grid=(2, 3, 3))  # positions of 4 frames of 48 pixels
    assert source_config({"model": resized.to_dict()}, {}, "w.pth", None, 4, 48)[0] == resized
    with pytest.raises(InputError, match="of 4 frames of 48 x 48 pixels, not of 8 frames of 64 pixels"):
        source_config({"model": resized.to_dict()}, {}, "w.pth", None, *OWN)
    with pytest.raises(InputError, match="does not say which architecture it is of; name it with --model"):
        source_config({}, {}, "w.pth")
    assert at_size(resized, img_size=48, num_frames=4) == TINY.replace(img_size=48, num_frames=4)
    assert at_size(TINY, img_size=32).pos_grid == (4, 4, 4) and at_size(LEARNED, img_size=32).pos_grid is None


def test_finetuning_starts_from_learned_positions_of_a_published_file(tmp_path, labelled_world):
    """Interpolated to the new model's, and not replaced by fixed ones."""
    original = randomised(build_pretrainer(LEARNED))
    official(tmp_path / "w.pth", original)
    words = [
        "--data",
        str(labelled_world / "train.txt"),
        "--init",
        str(tmp_path / "w.pth"),
        "--model",
        "vit_tiny",
    ]
    words += [
        "--init-frames",
        "8",
        "--num-frames",
        "8",
        "--image-size",
        "64",
        "--stride",
        "1",
        "--batch-size",
        "4",
    ]
    words += ["--output", str(tmp_path / "run"), "--device", "cpu", "--workers", "0", "--no-tensorboard"]
    words += ["--steps", "1", "--lr", "1e-9"]
    assert main(["finetune", *words]) == 0
    settings, state = read_settings_and_weights(tmp_path / "run" / "weights.pth")
    assert settings["model"]["learned_pos"] and torch.allclose(
        state["pos_embed"], original.encoder.pos_embed, atol=1e-6
    )
