"""`attention` and `pca`: maps and components against independent computations, from every kind of
checkpoint."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vmae import DualMask, InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import CheckpointFolder, export_weights
from vmae.checkpoint.saver import Saver
from vmae.cli import main
from vmae.config import IMAGENET_MEAN, IMAGENET_STD
from vmae.data.decode import open_video
from vmae.evaluate.attention_maps import attention_maps, block_number, draw_maps, parse_query
from vmae.evaluate.encoder import load_encoder, middle_clip
from vmae.evaluate.pca import draw_components, principal_components
from vmae.synthetic.samples import sample_videos

# 4 x 4 x 8 tokens, wider than high.
SIZES = dict(img_size=(32, 64), patch_size=8, num_frames=8, embed_dim=48, depth=3, num_heads=4)
CONFIG = ModelConfig(**SIZES, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
VIDEO = str(sample_videos()[2])
CLIP = {"num_frames": 8, "image_size": (32, 64), "stride": 3}


@pytest.fixture(scope="module")
def clip():
    return middle_clip(VIDEO, CONFIG, 2)[0]


@pytest.fixture
def classifier():
    return build_classifier(CONFIG, 5).eval()


@pytest.fixture
def weights(tmp_path, classifier):
    settings = {"model": CONFIG.to_dict(), "num_classes": 5, "clip": CLIP, "pooling": "mean"}
    export_weights(tmp_path / "weights.pth", classifier.state_dict(), config=settings)
    return tmp_path / "weights.pth"


# --- Loading ---


@pytest.mark.parametrize("pooling", ["mean", "first", "attentive"])
def test_classifiers_give_their_tokens(tmp_path, clip, pooling):
    model = build_classifier(CONFIG, 5, pooling=pooling).eval()
    settings = {
        "model": CONFIG.to_dict(),
        "num_classes": 5,
        "clip": {**CLIP, "sampling": "sparse"},
        "pooling": pooling,
    }
    Saver(CheckpointFolder(tmp_path)).save(
        1, {"model": model.state_dict(), "optimizer": {}}, {"config": settings}
    )
    loaded = load_encoder(tmp_path)
    assert (loaded.stride, loaded.sampling, loaded.pretrained) == (3, "sparse", False)
    assert torch.equal(loaded.model.tokens(clip), model.tokens(clip)) and not loaded.model.training
    assert loaded.model.num_classes == 0


@pytest.mark.parametrize("learned", [False, True])
def test_pretrained_encoders_end_with_their_norm(tmp_path, clip, learned):
    model = build_pretrainer(CONFIG.replace(learned_pos=learned)).eval()
    settings = {"model": model.config.to_dict(), "mask": {}, "stride": 2}
    Saver(CheckpointFolder(tmp_path)).save(
        1, {"model": model.state_dict(), "optimizer": {}}, {"config": settings}
    )
    loaded = load_encoder(tmp_path)
    assert loaded.pretrained and loaded.stride == 2 and load_encoder(tmp_path, stride=5).stride == 5
    every = torch.arange(CONFIG.num_tokens, dtype=torch.int32)[None]
    mask = dataclasses.replace(DualMask.sample(1, CONFIG.grid), visible=every)
    expected = model.encoder.norm(model.encode(clip, mask))
    assert torch.allclose(loaded.model.tokens(clip), expected, atol=1e-6)


def test_published_files_need_no_preset(tmp_path, clip):
    sizes = dict(num_frames=8, img_size=(32, 64), patch_size=16)
    config = ModelConfig.preset("vit_tiny", **sizes)
    pretrainer, classifier = build_pretrainer(config).eval(), build_classifier(config, 400).eval()
    torch.save({"model": pretrainer.state_dict()}, tmp_path / "pretrained.pth")
    torch.save({"module": classifier.state_dict()}, tmp_path / "tuned.pth")
    encoder = {name: value for name, value in pretrainer.state_dict().items() if name.startswith("encoder.")}
    torch.save({"model": encoder}, tmp_path / "encoder_only.pth")
    changes = {"num_frames": 8, "img_size": (32, 64)}
    found = {}
    for name in ("pretrained", "tuned", "encoder_only"):
        told = load_encoder(tmp_path / f"{name}.pth", changes=changes)
        assert "taken as vit_tiny by its shapes" in told.note
        loaded = load_encoder(tmp_path / f"{name}.pth", preset="vit_tiny", changes=changes)
        assert loaded.pretrained == (name != "tuned") and loaded.model.config.grid == (4, 2, 4)
        assert loaded.model.config.pos_grid == (8, 14, 14)  # published: 16 frames of 224 pixels
        found[name] = loaded.model.tokens(clip)
        assert torch.equal(told.model.tokens(clip), found[name])
    assert torch.equal(found["pretrained"], found["encoder_only"])
    same = load_encoder(
        tmp_path / "tuned.pth", preset="vit_tiny", changes={**changes, "pos_grid": None}, source=(8, 32)
    )
    assert same.model.config.pos_grid == (4, 2, 2)
    with pytest.raises(InputError, match="another architecture"):
        load_encoder(tmp_path / "tuned.pth", preset="vit_s")


# --- Attention ---


def attention_by_hand(model, clip, block):
    """Attention, float64 [H, N, N], and values [H, N, d], from the weights, without the model's attention
    code."""
    x = model.patch_embed(_normalised(clip)) + model.pos_embed
    for one in model.blocks[:block]:
        x = one(x)
    layer, x = model.blocks[block].attn, model.blocks[block].norm1(x)[0].double()
    q, k, v = (part.double() for part in layer.qkv.weight.chunk(3))
    q, k, v = (
        (x @ weight.T + bias).unflatten(1, (layer.num_heads, -1)).transpose(0, 1)
        for weight, bias in ((q, layer.q_bias), (k, 0), (v, layer.v_bias))
    )
    scale = q.shape[-1] ** -0.5
    if layer.scale is not None:
        q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), layer.scale.double().exp()
    return (q @ k.transpose(1, 2) * scale).softmax(-1), v


def _normalised(clip):
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((clip.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@torch.no_grad()
def test_maps_are_those_of_the_block(clip, cosine, recompute):
    model = build_classifier(CONFIG.replace(cos_attn=cosine), 0, recompute=recompute).eval()
    for name, value in model.named_parameters():
        if "attn" in name and "scale" not in name:
            value.copy_(0.3 * torch.randn_like(value))
    weights, _ = attention_by_hand(model, clip, 1)
    received = attention_maps(model, clip, 1)
    assert torch.allclose(received.double(), weights.mean(1) * CONFIG.num_tokens, rtol=1e-3, atol=1e-4)
    assert torch.allclose(received.mean(1), torch.ones(4), atol=1e-5) and received.std() > 0.01
    of_query = attention_maps(model, clip, 1, (2, 1, 5))
    row = 2 * 32 + 1 * 8 + 5
    assert torch.allclose(of_query.double(), weights[:, row] * CONFIG.num_tokens, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(of_query, attention_maps(model, clip, 2, (2, 1, 5)), atol=0.1)
    assert not model.blocks[1].attn._forward_pre_hooks


def test_map_is_drawn_where_its_token_is(clip):
    maps = torch.zeros(1, CONFIG.num_tokens)
    maps[0, 2 * 32 + 1 * 8 + 5 : 2 * 32 + 2 * 8] = 8.0
    given, grey, dimmed = draw_maps(maps, clip[0].numpy(), CONFIG, (2, 1, 5))
    bright = np.zeros((8, 32, 64), bool)
    bright[4:6, 8:16, 40:64] = True
    assert np.array_equal(grey.frames[..., 0] == 255, bright) and "8.00 x uniform" in grey.caption
    assert np.array_equal(dimmed.frames[bright], given.frames[bright])
    assert np.abs(dimmed.frames[~bright] - 0.15 * given.frames[~bright]).max() <= 0.5 + 1e-6
    assert all(np.argwhere(one.outlined).tolist() == [[2, 1, 5]] for one in (given, grey, dimmed))
    maps[0] = 0.2
    maps[0, 9] = 100.0  # almost all goes to one token: the others stay dark
    assert np.array_equal(np.unique(draw_maps(maps, clip[0].numpy(), CONFIG)[1].frames), [51, 255])


def test_attention_command(weights, tmp_path, capsys):
    command = ["attention", VIDEO, "--checkpoint", str(weights), "--device", "cpu"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "block 3; attention that each token receives" in text and "no class token" in text
    assert (tmp_path / "attention-carphone_pristine.png").exists()
    gif = tmp_path / "x.gif"
    flags = ["--heads", "each", "--block", "-3", "--query", "1,0,7", "--output", str(gif)]
    assert main([*command, *flags]) == 0
    text = capsys.readouterr().out
    # 120 frames, 8 of every third: from the middle of 97 starts, and tubelets of two.
    assert "block 1; attention of the outlined query token (time 1, from frame 54; row 0, column 7)" in text
    with Image.open(gif) as picture:
        assert picture.n_frames == 8 and picture.width > 4 * 192  # five panels: the input, and four heads


# --- Principal components ---


def test_components_of_a_hand_made_cloud():
    """Three directions of known variance, rotated and shifted, are found in order."""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((500, 5)) - 0.0
    latent = np.linalg.qr(latent - latent.mean(0))[0] * [
        6,
        3,
        2,
        1e-3,
        1e-3,
    ]  # uncorrelated, of known lengths
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    scores, shares = principal_components(torch.from_numpy(latent @ rotation.T + 40).double())
    assert np.abs(np.abs(scores) - np.abs(latent[:, :3])).max() < 1e-9
    assert shares == pytest.approx(np.array([36, 9, 4]) / 49, rel=1e-6)
    for k in range(3):  # the sign: the largest weight of each direction is positive
        sign = np.sign(scores[:, k] @ latent[:, k])
        assert (sign * rotation[:, k])[np.abs(rotation[:, k]).argmax()] > 0


def test_components_are_drawn_as_colours_and_the_first_in_grey(clip):
    scores = np.zeros((CONFIG.num_tokens, 3))
    scores[: CONFIG.num_tokens // 2] = [1, 0, 0]
    scores[CONFIG.num_tokens // 2 :] = [-1, 4, 0]
    given, colours, first = draw_components(scores, np.array([0.5, 0.25, 0.0]), clip[0].numpy(), CONFIG)
    assert np.array_equal(given.frames, clip[0].numpy())
    assert (colours.frames[:4] == [255, 0, 0]).all() and (colours.frames[4:] == [0, 255, 0]).all()
    assert (first.frames[:4] == 255).all() and (first.frames[4:] == 0).all()
    assert "component 1 (50 % of the variance), green: 2 (25 %)" in colours.caption


def test_impossible_components_are_refused():
    with pytest.raises(InputError, match="three tokens"):
        principal_components(torch.zeros(2, 8))
    with pytest.raises(InputError, match="not finite"):
        principal_components(torch.full((8, 8), torch.nan))
    scores, shares = principal_components(torch.ones(8, 8))
    assert not scores.any() and not shares.any()  # all alike: nothing to see, and nothing breaks


def test_pca_command(weights, tmp_path, capsys, classifier):
    out = tmp_path / "x.mp4"
    assert main(["pca", VIDEO, "--checkpoint", str(weights), "--output", str(out), "--device", "cpu"]) == 0
    clip, _ = middle_clip(VIDEO, CONFIG, 3)
    values = torch.linalg.eigvalsh(torch.cov(classifier.tokens(clip)[0].detach().double().T)).flip(0)
    shares = ", ".join(f"{100 * share:.1f} %" for share in values[:3] / values.sum())
    assert f"of the variance: {shares}" in capsys.readouterr().out
    with open_video(out) as reader:
        assert len(reader) == 8
    assert main(["pca", VIDEO, "--checkpoint", str(weights)]) == 0
    assert (tmp_path / "pca-carphone_pristine.png").exists()
    flags = [
        "--num-frames",
        "4",
        "--image-size",
        "16x24",
        "--stride",
        "1",
        "--output",
        str(tmp_path / "y.gif"),
    ]
    assert main(["pca", VIDEO, "--checkpoint", str(weights), *flags]) == 0
    with Image.open(tmp_path / "y.gif") as gif:
        assert gif.n_frames == 4


# --- Wrong input ---


def test_blocks_are_counted_from_one():
    assert [block_number(given, 12) for given in (None, -1, 12, 1, -12)] == [11, 11, 11, 0, 0]
    for wrong in (0, 13, -13):
        with pytest.raises(InputError, match=f"--block {wrong}: the encoder has blocks 1 to 12"):
            block_number(wrong, 12)


def test_queries_are_tokens_of_the_grid():
    assert parse_query("3,2, 7", (4, 3, 8)) == (3, 2, 7)
    for wrong in ("4,0,0", "0,3,0", "0,0,8", "-1,0,0"):
        with pytest.raises(InputError, match="outside of the grid of 4 x 3 x 8 tokens: from 0,0,0 to 3,2,7"):
            parse_query(wrong, (4, 3, 8))
    for wrong in ("1,2", "1,2,3,4", "a,b,c", "1.5,0,0"):
        with pytest.raises(InputError, match="three whole numbers"):
            parse_query(wrong, (4, 3, 8))


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("attention", {"video": "gone.mp4"}, "gone.mp4"),
        ("pca", {"video": __file__}, "test_encoder_pictures.py"),
        ("pca", {"--checkpoint": "gone.pth"}, "gone.pth does not exist"),
        ("pca", {"--output": "{tmp}/x.webp"}, "ends with .png"),
        ("attention", {"--output": "{tmp}/weights.pth/x.png"}, "is not a folder"),
        ("attention", {"--block": "4"}, "blocks 1 to 3"),
        ("attention", {"--query": "4,0,0"}, "outside of the grid of 4 x 4 x 8"),
        ("attention", {"--stride": "0"}, "--stride/--sampling_rate: must be a whole number from 1"),
        ("pca", {"--num-frames": "3"}, "3 frames are not divisible"),
        ("pca", {"--image-size": "30"}, "not divisible by the patch size"),
        ("pca", {"--device": "tpu"}, "unknown device"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(weights, tmp_path, capsys, command, changes, message):
    flags = {"--checkpoint": str(weights), "--output": str(tmp_path / "x.gif"), **changes}
    video = flags.pop("video", VIDEO)
    assert (
        main([command, video, *(word.format(tmp=tmp_path) for flag in flags.items() for word in flag)]) == 2
    )
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and message in error
        and [path.name for path in tmp_path.iterdir()] == ["weights.pth"]
    )
