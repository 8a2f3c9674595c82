"""`python -m vmae reconstruct`: the picture holds what its captions say, and every wrong input is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmae import DualMask, InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder, export_weights, find_weights
from vmae.checkpoint.saver import Saver
from vmae.cli import main
from vmae.data.decode import open_video
from vmae.evaluate.encoder import middle_clip
from vmae.evaluate.pictures import GREY
from vmae.evaluate.reconstruct import assemble_frames, load_model, reconstruct
from vmae.synthetic.samples import sample_videos
from vmae_kernels import gather_tubelets

# 4 x 4 x 8 tokens, wider than high.
CONFIG = ModelConfig(
    img_size=(32, 64),
    patch_size=8,
    num_frames=8,
    embed_dim=48,
    depth=1,
    num_heads=2,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=2,
)
MASK = dict(encoder="tube", encoder_ratio=0.75, decoder="running_cell", decoder_ratio=0.5)
VIDEO = str(sample_videos()[2])


def settings(**changes) -> dict:
    return {"model": CONFIG.to_dict(), "mask": MASK, "stride": 2, "normalize_target": True, **changes}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pth"
    export_weights(path, build_pretrainer(CONFIG).state_dict(), config=settings())
    return path


@pytest.fixture
def clip():
    return middle_clip(VIDEO, CONFIG, 2)[0]


def mask_of(**changes) -> DualMask:
    return DualMask.sample(1, CONFIG.grid, **{**MASK, **changes}, generator=torch.Generator().manual_seed(0))


def per_tubelet(frames: np.ndarray) -> torch.Tensor:
    """[N, P]"""
    tokens = torch.arange(CONFIG.num_tokens)[None]
    return gather_tubelets(torch.from_numpy(frames)[None], tokens, CONFIG.patch_size, CONFIG.tubelet_size)[
        0
    ].flatten(1)


def test_command_writes_one_picture_and_prints_losses(weights, tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    assert (
        main(["reconstruct", VIDEO, "--checkpoint", str(weights), "--output", str(out), "--device", "cpu"])
        == 0
    )
    text = capsys.readouterr().out
    assert "zero predictor 0.9" in text and text.startswith("loss ") and f"written: {out}" in text
    with Image.open(out) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 4 * 256 and picture.height > 8 * 128
    assert [path.name for path in out.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    "flags", ["--decoder-mask none", "--encoder-mask random --decoder-mask random", "--frames 1 --stride 1"]
)
def test_other_masks(weights, tmp_path, flags):
    assert main(["reconstruct", VIDEO, "--checkpoint", str(weights), *flags.split()]) == 0
    assert (tmp_path / "reconstruct-carphone_pristine.png").exists()


def test_seed_decides_the_mask(weights, tmp_path):
    pictures = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.png"
        assert (
            main(
                [
                    "reconstruct",
                    VIDEO,
                    "--checkpoint",
                    str(weights),
                    "--output",
                    str(out),
                    "--seed",
                    str(seed),
                ]
            )
            == 0
        )
        pictures[name] = out.read_bytes()
    assert pictures["a"] == pictures["b"] != pictures["c"]


@pytest.mark.parametrize("decoder", ["running_cell", "none"])
def test_rows_show_what_their_captions_say(clip, decoder):
    model, mask = build_pretrainer(CONFIG).eval(), mask_of(decoder=decoder)
    result = reconstruct(model, clip, mask)
    pixels = per_tubelet(clip[0].numpy())
    visible, decoded = (~masked[0] for masked in mask.to_bool())
    rows = {panel.caption.split(" (")[0]: panel for panel in result.panels}
    assert list(rows) == [
        "input",
        "encoder view",
        "decoded tubelets",
        "reconstruction",
        "error in pixels",
        "prediction, normalised space",
        "target, normalised space",
        "error, normalised space",
    ]
    assert "with the input's patch mean and variance" in rows["reconstruction"].caption
    assert ("a second pass" in rows["reconstruction"].caption) == (decoder != "none")
    assert torch.equal(per_tubelet(rows["input"].frames), pixels)
    for name, shown in (("encoder view", visible), ("decoded tubelets", decoded)):
        found = per_tubelet(rows[name].frames)
        assert torch.equal(found[shown], pixels[shown]) and bool((found[~shown] == GREY).all())
    rebuilt = per_tubelet(rows["reconstruction"].frames).float()
    assert torch.equal(rebuilt[visible], pixels[visible].float())
    assert not torch.equal(rebuilt[~visible], pixels[~visible].float())
    assert np.array_equal(rows["decoded tubelets"].outlined.ravel(), visible.numpy())
    assert result.loss == pytest.approx(model(clip, mask).item())
    assert result.zero_loss == pytest.approx(1.0, abs=0.03)


def test_a_perfect_prediction_gives_the_input_back(clip):
    """Undoing the normalisation is exact: a model that predicts the target rebuilds every pixel."""

    class Perfect(torch.nn.Module):
        config, normalize_target = CONFIG, True

        def predict(self, clips, mask):
            from vmae_kernels import patch_targets_ref

            return patch_targets_ref(clips, mask.decode, CONFIG.patch_size, CONFIG.tubelet_size, True)

        def forward(self, clips, mask):
            return torch.zeros(())

    rows = {
        panel.caption.split(" (")[0]: panel.frames for panel in reconstruct(Perfect(), clip, mask_of()).panels
    }
    assert np.array_equal(rows["reconstruction"], rows["input"])
    assert np.array_equal(rows["prediction, normalised space"], rows["target, normalised space"])
    assert (
        rows["error in pixels"].max() <= 4 and not rows["error, normalised space"].any()
    )  # 4: what 1 grey level is drawn as


def test_pixel_targets_need_no_borrowed_statistics(clip):
    model = build_pretrainer(CONFIG, normalize_target=False).eval()
    captions = [panel.caption for panel in reconstruct(model, clip, mask_of()).panels]
    assert len(captions) == 5 and captions[3].startswith("reconstruction (predicted pixels")
    assert "statistics" not in captions[4]


def test_error_is_the_difference_of_what_is_drawn_and_only_where_it_was_predicted(clip):
    model, mask = build_pretrainer(CONFIG).eval(), mask_of()
    rows = {panel.caption.split(" (")[0]: panel for panel in reconstruct(model, clip, mask).panels}
    visible = ~mask.to_bool()[0][0]
    shown, pixels, rebuilt = (
        per_tubelet(rows[name].frames).float().unflatten(1, (-1, 3))
        for name in ("error in pixels", "input", "reconstruction")
    )
    assert not shown[visible].any() and np.array_equal(
        rows["error in pixels"].outlined.ravel(), visible.numpy()
    )
    wanted = ((rebuilt - pixels).abs().mean(2, keepdim=True) * 255 / 64).clamp(max=255)
    assert (shown - wanted)[
        ~visible
    ].abs().max() <= 3  # the reconstruction drawn is rounded: half a level, times 4
    assert shown[~visible].any(-1).any(-1).all()
    prediction, target, error = (
        per_tubelet(rows[f"{name}, normalised space"].frames).float().unflatten(1, (-1, 3))
        for name in ("prediction", "target", "error")
    )
    inside = ((target > 0) & (target < 255) & (prediction > 0) & (prediction < 255)).all(-1)
    wanted = ((prediction - target).abs().mean(2) / 127 * 255).clamp(max=255)
    assert (error[..., 0] - wanted)[~visible][inside[~visible]].abs().max() <= 4
    assert not error[visible].any()


def test_several_outputs_are_one_run(weights, tmp_path, capsys):
    """A picture, and animations with one picture for each frame of the clip."""
    outs = [tmp_path / name for name in ("x.png", "x.gif", "x.mp4")]
    flags = [word for out in outs for word in ("--output", str(out))]
    assert main(["reconstruct", VIDEO, "--checkpoint", str(weights), *flags, "--fps", "10"]) == 0
    assert ", ".join(map(str, outs)) in capsys.readouterr().out
    with Image.open(outs[1]) as gif, open_video(outs[2]) as mp4:
        assert gif.format == "GIF" and gif.n_frames == len(mp4) == CONFIG.num_frames
        assert gif.info["duration"] == 100 and mp4.fps == 10 and mp4.codec == "h264"
        gif.seek(5)
        first, same = np.asarray(gif.convert("L")).astype(int), mp4.frames([5])[0].mean(2)
    height, width = first.shape
    assert abs(first - same[:height, :width]).mean() < 6  # one palette, one chroma subsampling apart
    assert sorted(path.name for path in tmp_path.glob("x.*")) == ["x.gif", "x.mp4", "x.png"]


def test_several_videos_share_a_picture_a_row_for_each(weights, tmp_path, capsys):
    """Three panels side by side; 3 rows of frames are 3 x 192 pixels and their captions."""
    out, videos = tmp_path / "x.png", [str(video) for video in sample_videos()[:3]]
    flags = ["--output", str(out), "--title", "learnt by heart"]
    assert main(["reconstruct", *videos, "--checkpoint", str(weights), *flags]) == 0
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in text.splitlines() if ": loss" in line] == [
        "bikes",
        "bigbuckbunny",
        "carphone_pristine",
    ]
    with Image.open(out) as picture:
        assert picture.width == 3 * (384 + 4) + 4 and 3 * 192 < picture.height < 6 * 192


def test_every_hidden_tubelet_is_predicted_under_its_own_selection(clip):
    model, mask = build_pretrainer(CONFIG).eval(), mask_of()
    asked = []
    plain = model.predict
    model.predict = lambda clips, selection: asked.append(selection) or plain(clips, selection)
    reconstruct(model, clip, mask)
    assert torch.equal(asked[-1].decode, mask.decode) and all(
        torch.equal(one.visible, mask.visible) for one in asked
    )
    seen = torch.cat([mask.visible, *(one.decode for one in asked)], dim=1).unique()
    assert len(seen) == CONFIG.num_tokens


def test_middle_clip_is_centred_in_time_and_space():
    clip, indices = middle_clip(VIDEO, CONFIG, 2)
    assert clip.shape == (1, 8, 32, 64, 3) and clip.dtype == torch.uint8
    assert indices == list(range(indices[0], indices[0] + 16, 2)) and indices[0] == (120 - 16 + 1) // 2
    with pytest.raises(InputError, match="stride 0"):
        middle_clip(VIDEO, CONFIG, 0)


def test_assembled_frames_invert_gathering(clip):
    assert torch.equal(assemble_frames(per_tubelet(clip[0].numpy()), CONFIG), clip[0])


def test_a_run_folder_gives_its_newest_checkpoint(tmp_path, weights):
    assert find_weights(tmp_path) == weights
    model = build_pretrainer(CONFIG)
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        Saver(folder).save(step, {"model": model.state_dict(), "optimizer": {}}, {"config": settings()})
    newest = folder.path_of(2)
    assert find_weights(tmp_path) == newest == find_weights(newest)
    loaded, read = load_model(newest)
    assert read["stride"] == 2 and not loaded.training and loaded.config == CONFIG
    assert torch.equal(loaded.mask_token, model.mask_token)


def test_a_classifier_has_no_decoder(tmp_path):
    export_weights(tmp_path / "x.pth", build_classifier(CONFIG, 3).state_dict(), config=settings())
    with pytest.raises(InputError, match="x.pth has no decoder"):
        load_model(tmp_path / "x.pth")


def test_official_files_need_no_preset(tmp_path, capsys):
    from safetensors.torch import save_file

    model = build_pretrainer(ModelConfig.preset("vit_tiny", decoder_depth=1))
    torch.save({"module": model.state_dict()}, tmp_path / "official.pth")
    save_file(dict(model.state_dict()), tmp_path / "official.safetensors")
    for name in ("official.pth", "official.safetensors"):
        path = tmp_path / name
        for given in ({}, {"preset": "vit_tiny"}, {"preset": "vit_tiny", "decoder_depth": 1}):
            loaded, read = load_model(path, **given)
            assert read == {} and torch.equal(loaded.mask_token, model.mask_token)
        with pytest.raises(InputError, match="a decoder of 1 blocks instead of 2"):
            load_model(path, preset="vit_tiny", decoder_depth=2)
    flags = ["--model", "vit_tiny", "--decoder-depth", "1", "--frames", "2"]
    assert main(["reconstruct", VIDEO, "--checkpoint", str(tmp_path / "official.pth"), *flags]) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"video": "gone.mp4"}, "gone.mp4"),
        ({"video": __file__}, "test_reconstruct.py"),
        ({"--checkpoint": "gone.pth"}, "gone.pth does not exist"),
        ({"--checkpoint": "{tmp}/empty"}, "holds no complete checkpoint"),
        ({"--output": "{tmp}/x.jpg"}, "x.jpg: give a name that ends with .png"),
        ({"--output": "{tmp}/empty"}, "ends with .png"),
        ({"--fps": "0"}, "--fps: must be a whole number from 1 to 50, not 0"),
        ({"--stride": "0"}, "--stride/--sampling_rate: must be a whole number from 1"),
        ({"--output": "{tmp}/weights.pth/x.png"}, "is not a folder"),
        ({"--frames": "0"}, "--frames"),
        ({"--stride": "-1"}, "stride"),
        ({"--encoder-mask": "cube"}, "unknown encoder mask 'cube'"),
        ({"--encoder-ratio": "0"}, "the loss would count no token"),
        ({"--device": "tpu"}, "unknown device"),
    ],
)
def test_wrong_input_is_named_and_no_picture_is_written(weights, tmp_path, capsys, changes, words):
    (tmp_path / "empty").mkdir()
    flags = {"--checkpoint": str(weights), "--output": str(tmp_path / "x.png"), **changes}
    video = flags.pop("video", VIDEO)
    words_of = [word.format(tmp=tmp_path) for flag in flags.items() for word in flag]
    assert main(["reconstruct", video, *words_of]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error, error
    assert not list(tmp_path.rglob("*.png"))
