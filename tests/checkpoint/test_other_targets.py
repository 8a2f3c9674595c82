"""Checkpoints whose decoder predicts something else than pixels: what they start, and who refuses them."""

import pytest
import torch

from vmae import InputError, ModelConfig, build_pretrainer
from vmae.checkpoint import export_weights, read_checkpoint, to_model
from vmae.checkpoint.inspection import inspect_weights
from vmae.checkpoint.models import start_pretrainer
from vmae.cli import main
from vmae.evaluate.encoder import load_encoder
from vmae.synthetic.samples import sample_videos
from vmae.targets.building import build_target
from vmae.targets.settings import TargetConfig, Wanted

CONFIG = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4, depth=1, decoder_depth=1)
HEAD = ("decoder.head.weight", "decoder.head.bias")


def target_of(teacher, config=CONFIG):
    settings = TargetConfig(name="teacher", teacher=str(teacher))
    return build_target(Wanted(config, settings)), settings.to_dict()


@pytest.fixture
def files(tmp_path):
    """Weights of a pixel model, and of one that predicts its 128 latents, of all settings and of none."""
    torch.manual_seed(0)
    pixels, about = build_pretrainer(CONFIG), {"model": CONFIG.to_dict()}
    export_weights(tmp_path / "pixels.pth", pixels.state_dict(), config=about)
    target, told = target_of(tmp_path / "pixels.pth")
    latents = build_pretrainer(CONFIG, target=target)
    export_weights(tmp_path / "latents.pth", latents.state_dict(), config={**about, "target": told})
    torch.save({"model": latents.state_dict()}, tmp_path / "bare.pth")
    return tmp_path


def assert_started(model, source, fresh):
    """All tensors of the file are in the model, but for the head where that starts fresh."""
    before = {name: model.state_dict()[name].clone() for name in HEAD}
    report = start_pretrainer(model, source)
    for name, value in model.state_dict().items():
        expected = before[name] if fresh and name in HEAD else source.state[name]
        assert torch.equal(value, expected), name
    return report


def test_the_head_starts_fresh_where_it_predicts_something_else(files):
    pixels, latents, bare = (read_checkpoint(files / f"{n}.pth") for n in ("pixels", "latents", "bare"))
    target, _ = target_of(files / "pixels.pth")
    tensors = len(pixels.state)
    report = assert_started(build_pretrainer(CONFIG, target=target), pixels, fresh=True)
    assert report.startswith(
        f"{files / 'pixels.pth'}: {tensors - 2} tensors loaded; it predicts pixels, this"
    )
    assert report.endswith("(128 values a token): the head starts fresh") and "\n" not in report
    report = assert_started(build_pretrainer(CONFIG), latents, fresh=True)
    named = f"it predicts the target teacher ({files / 'pixels.pth'}), 128 values a token, this model pixels"
    assert named in report
    report = assert_started(build_pretrainer(CONFIG), bare, fresh=True)
    assert "it predicts 128 values a token (a tubelet has 1536 of pixels), this model pixels" in report
    # Of the same target: everything is loaded, as pixels by pixels.
    for model, source in (
        (build_pretrainer(CONFIG, target=target), latents),
        (build_pretrainer(CONFIG), pixels),
    ):
        assert f"all {tensors} tensors loaded" in assert_started(model, source, fresh=False)


def test_a_head_of_the_same_width_and_another_target_starts_fresh_too(tmp_path):
    """A teacher as wide as a tubelet has pixel values: shapes alone do not tell."""
    wide = CONFIG.replace(embed_dim=96, num_heads=2, patch_size=4, img_size=16)
    export_weights(tmp_path / "p.pth", build_pretrainer(wide).state_dict(), config={"model": wide.to_dict()})
    target, _ = target_of(tmp_path / "p.pth", wide)
    source = read_checkpoint(tmp_path / "p.pth")
    assert target.width == wide.tubelet_pixels == source.head_shape[0] and source.target == "pixels"
    assert "the head starts fresh" in assert_started(
        build_pretrainer(wide, target=target), source, fresh=True
    )


def test_nothing_else_becomes_laxer(files):
    source = read_checkpoint(files / "pixels.pth")
    target, _ = target_of(files / "pixels.pth")
    for change, words in (
        ({"decoder_embed_dim": 32}, r"mask_token: \[1, 1, 64\] in the file, \[1, 1, 32\] in the model"),
        ({"depth": 2}, r"missing in the file \(\d+\): encoder.blocks.1"),
        ({"decoder_depth": 2}, r"missing in the file \(\d+\): decoder.blocks.1"),
    ):
        model = build_pretrainer(CONFIG.replace(**change), target=target)
        before = model.mask_token.clone()
        with pytest.raises(InputError, match=words):
            start_pretrainer(model, source)
        assert torch.equal(model.mask_token, before), "nothing half-loaded"
    broken = {name: value for name, value in source.state.items() if name != HEAD[1]}
    torch.save({"model": broken}, files / "broken.pth")
    for model in (build_pretrainer(CONFIG), build_pretrainer(CONFIG, target=target)):
        with pytest.raises(InputError, match="decoder.head.bias"):
            start_pretrainer(model, read_checkpoint(files / "broken.pth"))


def test_those_that_need_pixels_say_what_it_predicts(files, capsys):
    latents, video = str(files / "latents.pth"), str(sample_videos()[2])
    for command in (
        ["reconstruct", video, "--checkpoint", latents],
        ["serve", "--checkpoint", latents],
        ["convert", latents, str(files / "folder")],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {latents} rebuilds no pixels: it predicts the target teacher (")
        assert "pixels.pth), 128 values a token" in error and error.count("\n") == 1
    assert sorted(path.name for path in files.iterdir()) == ["bare.pth", "latents.pth", "pixels.pth"]
    with pytest.raises(InputError, match="it predicts 128 values a token"):
        to_model(
            read_checkpoint(files / "bare.pth", preset="vit_tiny", decoder_depth=1, depth=1), "pretrainer"
        )


def test_its_encoder_is_as_any(files, capsys):
    clip = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    encoder = load_encoder(files / "latents.pth")
    assert encoder.pretrained and encoder.model.tokens(clip).shape == (1, 8, 128)
    assert main(["export", str(files / "latents.pth"), str(files / "out.safetensors")]) == 0
    again = read_checkpoint(files / "out.safetensors")
    assert (
        again.target == "teacher" and again.state.keys() == read_checkpoint(files / "bare.pth").state.keys()
    )


def test_weights_inspect_tells(files):
    assert "whose decoder predicts 128 values a token (a tubelet" in inspect_weights(files / "bare.pth").what
    found = inspect_weights(files / "latents.pth")
    assert "whose decoder predicts the target teacher (" in found.what
    uses = {use.command: use for use in found.uses}
    assert uses["pretrain --init"].works and "the head starts fresh" in uses["pretrain --init"].why
    assert not uses["reconstruct"].works and uses["reconstruct"].why.startswith("it rebuilds no pixels")
    assert uses["finetune --init"].works and uses["features, vmae.load"].works
    assert not found.missing and all(key.fate == "loaded" for key in found.keys)
