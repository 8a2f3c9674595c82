"""`vmae.load`: results of the commands `features` and `predict`, from paths, lists and frames in memory."""

import json
import logging
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vmae
from vmae import InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.cli import main
from vmae.config import IMAGENET_MEAN, IMAGENET_STD
from vmae.data.decode import DecodeError, open_video
from vmae.evaluate.features import read_features
from vmae.synthetic.samples import sample_videos

CONFIG = ModelConfig(
    img_size=32, num_frames=8, embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_num_heads=2
)
NAMES = ["run", "walk", "fall", "rest", "wave"]
CLIP = {"num_frames": 8, "image_size": 32, "sampling": "dense", "stride": 2}


def randomised(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`tuned.pth` (with class names), `pretrained.pth`, and `plain.pth`, which says nothing of itself."""
    made = tmp_path_factory.mktemp("weights")
    classifier, pretrainer = randomised(build_classifier(CONFIG, 5)), randomised(build_pretrainer(CONFIG))
    settings = {"model": CONFIG.to_dict(), "num_classes": 5, "class_names": NAMES, "clip": CLIP}
    export_weights(made / "tuned.pth", classifier.state_dict(), config=settings)
    about = {"model": CONFIG.to_dict(), "stride": 3}
    export_weights(made / "pretrained.pth", pretrainer.state_dict(), config=about)
    export_weights(made / "plain.pth", classifier.state_dict())
    return made


@pytest.fixture(scope="module")
def model(folder):
    return vmae.load(folder / "tuned.pth", device="cpu")


@pytest.fixture(scope="module")
def video() -> str:
    return str(sample_videos()[2])  # 120 frames of 176 x 144


@pytest.fixture(scope="module")
def frames(video) -> np.ndarray:
    with open_video(video) as reader:
        return reader.frames(range(len(reader)))


@pytest.fixture(scope="module")
def whole(model, video):
    return model.embed(video)


# --- the same as the commands ---


@pytest.mark.parametrize("weights", ["tuned.pth", "pretrained.pth"])
@pytest.mark.parametrize("flags, options", [([], {}), (["--step", "6", "--normalize"], {"step": 6})])
def test_embed_is_features_to_the_bit(folder, video, tmp_path, weights, flags, options):
    checkpoint = str(folder / weights)
    command = ["features", video, "--checkpoint", checkpoint, "--output", str(tmp_path), "--device", "cpu"]
    assert main([*command, *flags]) == 0
    found = vmae.load(checkpoint, device="cpu").embed(video, normalize="--normalize" in flags, **options)
    (file,) = tmp_path.glob("*.npy")
    expected = read_features(file)
    assert found.features.dtype == np.float32 and found.shape == expected.shape == (len(expected), 48)
    assert np.array_equal(found.features, expected)


def test_predict_is_the_commands_answer_to_the_bit(folder, model, video, capsys):
    command = ["predict", video, "--checkpoint", str(folder / "tuned.pth"), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]
    found = model.predict(video)
    assert [{"name": name, "probability": share} for name, share in found] == classes
    assert main(command) == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert found.all.shape == (5,) and abs(found.all.sum() - 1) < 1e-6
    assert [found.all[number] for number in found.numbers] == found.probabilities.tolist()
    assert found[0] == (found.names[0], found.probabilities[0]) and len(model.predict(video, top=2)) == 2
    assert [NAMES[number] for number in found.numbers] == list(found.names)


def test_views_and_dtype_change_predictions(folder, model, video):
    one = model.predict(video, segments=1, crops=1)
    assert not np.array_equal(one.all, model.predict(video).all)
    half = vmae.load(folder / "tuned.pth", device="cpu", dtype="bfloat16").predict(video, segments=1, crops=1)
    assert 0 < np.abs(one.all - half.all).max() < 0.1


# --- what embed gives ---


def test_times_are_those_of_the_windows(whole, video):
    with open_video(video) as reader:
        fps = reader.fps
    assert whole.frames.tolist()[:2] == [[0, 8], [4, 12]] and whole.frames[-1, 1] <= 120
    assert whole.fps == fps and np.allclose(whole.times, whole.frames / fps)
    features, times = whole
    assert features is whole.features and times.shape == (29, 2)
    assert np.array_equal(np.asarray(whole), features) and np.asarray(whole, dtype="float64").dtype == float


def test_a_window_is_the_pooled_output_before_the_head(model, frames):
    """Of normalised frames of the model's size it is what a hub model gives for [B, C, T, H, W]."""
    clip = np.ascontiguousarray(frames[:8, :32, :32])
    values = (torch.from_numpy(clip) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    with torch.inference_mode():
        network = model.torch
        tokens = network.tokens(values.permute(3, 0, 1, 2)[None])
        expected = network.fc_norm(tokens.mean(1))[0]
    found = model.embed(clip, normalize=True).features
    assert found.shape == (1, 48) and np.abs(found[0] - expected.numpy()).max() < 1e-5
    assert np.abs(model.embed(clip).features - found).max() > 1e-2


@pytest.mark.parametrize("prefix", ["encoder.", ""])
def test_a_pretrained_encoder_gives_the_mean_of_its_normed_tokens(folder, frames, tmp_path, prefix):
    """Also where the encoder stands alone, without the prefix."""
    pretrainer = randomised(build_pretrainer(CONFIG))
    state = {prefix + name: value for name, value in pretrainer.encoder.state_dict().items()}
    export_weights(tmp_path / "encoder.pth", state, config={"model": CONFIG.to_dict(), "stride": 3})
    alone = vmae.load(tmp_path / "encoder.pth", device="cpu")
    model = vmae.load(folder / "pretrained.pth", device="cpu")
    clip = torch.from_numpy(np.ascontiguousarray(frames[:8, :32, :32]))
    values = (clip / 255).permute(3, 0, 1, 2)[None]
    with torch.inference_mode():
        tokens = model.torch.tokens(values)
        assert tokens.mean(-1).abs().max() > 1e-3  # the norm's own weight and bias are applied
        expected = tokens.mean(1)[0]
    assert np.abs(model.embed(clip).features[0] - expected.numpy()).max() < 1e-5
    assert np.array_equal(alone.embed(clip).features, model.embed(clip).features)
    assert model.loaded.clip.stride == 3
    with pytest.raises(InputError, match="pretrained.pth has no head, so it names no classes; embed"):
        model.predict(clip)


# --- frames in memory and in folders ---


def test_frames_give_what_their_file_gives(model, whole, video, frames):
    for same in (frames, torch.from_numpy(frames), frames[..., ::-1].copy()[..., ::-1]):
        found = model.embed(same, fps=25)
        assert np.array_equal(found.features, whole.features) and found.fps == 25
    assert model.embed(frames[:8]).times is None
    fixed = frames[:16].copy()
    fixed.flags.writeable = False  # as PIL's and many a decoder's
    assert np.array_equal(model.embed(fixed).features, whole.features[:3])
    assert np.array_equal(model.predict(frames).all, model.predict(video).all)
    assert torch.equal(model.tokens(frames), model.tokens(video))
    assert model.tokens(video).shape == (4, 2, 2, 48)


def test_a_folder_of_frames(model, frames, tmp_path, capsys, folder):
    for name in ("shot-{:03}.png", "shot-{}.png"):
        images = tmp_path / name[5:7]
        images.mkdir()
        for number in range(12):
            Image.fromarray(frames[number]).save(images / name.format(number + 3))
        found = model.embed(images, fps=10)
        assert np.array_equal(found.features, model.embed(frames[:12]).features)
        assert found.times.tolist() == [[0, 0.8], [0.4, 1.2]]
        assert np.array_equal(model.predict(str(images)).all, model.predict(frames[:12]).all)
    command = ["predict", str(images), "--checkpoint", str(folder / "tuned.pth"), "--device", "cpu"]
    assert main(command) == 0 and "%" in capsys.readouterr().out
    (images / "shot-9.png").unlink()
    with pytest.raises(InputError, match=r"shot-9\.png is missing between its images"):
        model.embed(images)
    (images / "cover.png").write_bytes(b"")
    with pytest.raises(InputError, match="not numbered alike"):
        model.embed(images)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((8, 32, 32, 3), "float32", r"uint8 \[T, H, W, 3\], RGB from 0 to 255, not float32"),
        ((3, 8, 32, 32), "uint8", r"looks like \[3, T, H, W\]: `.transpose\(1, 2, 3, 0\)`"),
        ((8, 3, 32, 32), "float32", r"looks like \[T, 3, H, W\]"),
        ((8, 32, 32, 4), "uint8", "make them RGB"),
        ((2, 8, 32, 32, 3), "uint8", r"several videos are a list of them: `list\(frames\)`"),
        ((32, 32, 3), "uint8", "numpy.stack"),
        ((0, 32, 32, 3), "uint8", "there is no pixel"),
    ],
)
def test_other_arrays_are_refused(model, shape, dtype, message):
    for array in (np.zeros(shape, dtype), torch.zeros(shape, dtype=getattr(torch, dtype))):
        for use in (model.embed, model.predict, model.tokens):
            with pytest.raises(InputError, match=message):
                use(array)


def test_what_is_no_video_is_refused_before_any_is_read(model, video, frames, tmp_path):
    with pytest.raises(InputError, match="a list of frames: `numpy.stack"):
        model.embed(list(frames[:8]))
    with pytest.raises(InputError, match="not NoneType"):
        model.embed([video, None])
    with pytest.raises(InputError, match="frames of video 1"):
        model.embed([video, frames.astype("float32")])
    with pytest.raises(InputError, match="not int; or give a list"):
        model.predict(7)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="holds videos, not frames: give their paths"):
        model.embed(tmp_path)
    for wrong in (dict(step=0), dict(fps=0), dict(batch_size=0)):
        with pytest.raises(InputError, match=next(iter(wrong))):
            model.embed(video, **wrong)
    with pytest.raises(InputError, match="top must be at least 1"):
        model.predict(video, top=0)
    assert model.embed([]) == [] == model.predict([])


# --- several videos ---


def test_a_list_of_videos_loses_nothing_to_a_broken_one(model, whole, video, frames, tmp_path, caplog):
    (tmp_path / "bad.mp4").write_text("no video")
    several = [video, tmp_path / "bad.mp4", frames, frames[:5], tmp_path / "none.mp4", video]
    with caplog.at_level(logging.WARNING, "vmae"):
        found = model.embed(several)
    for place in (0, 2, 5):
        np.testing.assert_allclose(found[place].features, whole.features, rtol=0, atol=1e-5)
    assert [found[0].fps, found[2].fps, found[5].fps] == [whole.fps, None, whole.fps]
    assert all(isinstance(found[place], DecodeError) for place in (1, 3, 4))
    assert "bad.mp4" in str(found[1]) and "has 5 frames, fewer than a window of 8" in str(found[3])
    assert "3 of 6 videos cannot be decoded" in caplog.text and "none.mp4: does not exist" in caplog.text
    found = model.predict([video, tmp_path / "bad.mp4", frames])
    assert "bad.mp4" in str(found[1]) and np.array_equal(found[0].all, found[2].all)
    for use in (model.embed, model.predict, model.tokens):
        with pytest.raises(DecodeError, match="bad.mp4"):
            use(tmp_path / "bad.mp4")


def test_a_worker_of_a_data_loader_has_no_workers_of_its_own(model, whole, video):
    ours, theirs = multiprocessing.Pipe()

    def work():
        theirs.send((model.embed(video).features, model.predict(video).all))

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    assert ours.poll(60)
    features, shares = ours.recv()
    process.join(10)
    assert np.array_equal(features, whole.features) and np.array_equal(shares, model.predict(video).all)


# --- loading ---


def test_errors_name_the_arguments_of_load(folder, tmp_path, caplog):
    with pytest.raises(InputError, match="plain.pth.* model="):
        vmae.load(folder / "plain.pth")
    overrides = dict(device="cpu", model="vit_tiny")
    with pytest.raises(InputError, match="is of another architecture"):
        vmae.load(folder / "plain.pth", **overrides)
    tiny = ModelConfig.preset("vit_tiny", img_size=32, num_frames=8)
    export_weights(tmp_path / "tiny.pth", build_classifier(tiny, 2).state_dict())
    with caplog.at_level(logging.WARNING, "vmae"):
        model = vmae.load(tmp_path / "tiny.pth", init_frames=8, init_size=32, classes=["a", "b"], **overrides)
    assert (
        "taken as dense sampling, stride 4, published pixels (sampling=, stride= and resize= say otherwise)"
        in caplog.text
    )
    assert "--" not in model.note and model.classes == ("a", "b") and "2 classes" in repr(model)
    for wrong, message in (
        (dict(device="gpu"), "unknown device 'gpu'"),
        (dict(dtype="float16"), "unknown dtype 'float16'"),
        (dict(classes=["a"]), "1 class names for a head of 2 classes"),
        (dict(averaged=True), "has no averaged weights"),
    ):
        with pytest.raises(InputError, match=message):
            vmae.load(tmp_path / "tiny.pth", **{**overrides, **wrong})
    with pytest.raises(InputError, match="does not exist"):
        vmae.load(tmp_path / "none.pth")


def test_clips_can_be_seen_otherwise(folder, frames):
    model = vmae.load(folder / "tuned.pth", device="cpu", num_frames=16, image_size=48, sampling="sparse")
    assert model.config.num_frames == 16 and model.config.pos_grid == (4, 2, 2)
    assert model.embed(frames[:16]).shape == (1, 48) and model.loaded.clip.sampling == "sparse"
    assert model.tokens(frames).shape == (8, 3, 3, 48)


def test_importing_vmae_does_not_load_torch():
    code = "import sys, vmae; assert 'load' in dir(vmae) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
