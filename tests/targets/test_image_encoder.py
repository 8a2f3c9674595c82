"""Image models of transformers as teachers: small real ones, with random weights. `make test-interop` runs
these."""

import json

import pytest
import torch
import torch.nn.functional as F

from vmae import DualMask, InputError, ModelConfig
from vmae.targets.building import build_target
from vmae.targets.frozen import frames_of, regridded, resized
from vmae.targets.image_encoder import find_image_model
from vmae.targets.settings import TargetConfig, Wanted

STUDENT = ModelConfig.preset("vit_tiny", img_size=32, num_frames=8, patch_size=8)
SMALL = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def test_what_is_none_of_transformers_goes_another_way(tmp_path):
    assert find_image_model(str(tmp_path)) is None and find_image_model(str(tmp_path / "x.pth")) is None
    for kind, found in (("videomae", None), ("dinov2", tmp_path)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert find_image_model(str(tmp_path)) == found


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(hf, tmp_path_factory):
    """`folders(name)`: a folder of a small model, with a processor's settings beside it."""
    root = tmp_path_factory.mktemp("hub")

    def made(name):
        folder = root / name
        if folder.exists():
            return folder
        wide = {**SMALL, "intermediate_size": 48}
        torch.manual_seed(0)
        model = {
            "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**wide)),
            "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**wide)),
            "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL)),
            "registers": lambda: hf.Dinov2WithRegistersModel(
                hf.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)
            ),
            "whole": lambda: hf.CLIPModel(
                hf.CLIPConfig(
                    vision_config=wide,
                    text_config=dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9),
                )
            ),
            "mae": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**wide)),
            "resnet": lambda: hf.ResNetModel(
                hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
            ),
            "bert": lambda: hf.BertModel(
                hf.BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
            ),
        }[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
        about = {"image_mean": MEAN, "image_std": STD, "crop_size": {"height": 28, "width": 28}}
        (folder / "preprocessor_config.json").write_text(json.dumps(about))
        return folder

    return made


def target_of(folder, student=STUDENT, **settings):
    settings = {"teacher_dtype": "float32", **settings}
    return build_target(Wanted(student, TargetConfig(name="teacher", teacher=str(folder), **settings)))


def batch(config=STUDENT):
    generator = torch.Generator().manual_seed(1)
    shape = (2, config.num_frames, *config.image_hw, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return clips, DualMask.sample(2, config.grid, encoder_ratio=0.75, generator=generator)


def expected_of(model, clips, mask, *, drop, layer=-1, mean=False):
    """By hand: each image alone, with the folder's own statistics."""
    frames = frames_of(clips, STUDENT)
    each = []
    for number in range(frames.shape[1]):
        images = resized(frames[:, number], (28, 28))
        images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        with torch.no_grad():
            out = model(pixel_values=images, output_hidden_states=True)
        tokens = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        each.append(tokens[:, drop:])
    x = torch.stack(each, 1)
    x = (x[:, ::2] + x[:, 1::2]) / 2 if mean else x[:, ::2]
    x = regridded(x.flatten(1, 2), (4, 4, 4), (4, 4, 4))
    rows = mask.target.long()[..., None].expand(-1, -1, 24)
    return F.layer_norm(x.gather(1, rows), (24,))


@pytest.mark.parametrize("name, drop", [("clip", 1), ("siglip", 0), ("dinov2", 1), ("registers", 5)])
def test_latents_are_the_patch_tokens_of_each_frame(hf, folders, name, drop):
    folder, (clips, mask) = folders(name), batch()
    model = hf.AutoModel.from_pretrained(folder).eval()
    target = target_of(folder)
    assert target.width == 24 and target.encoder.grid == (4, 4, 4) and target.encoder.prefix == drop
    torch.testing.assert_close(
        target.values(clips, mask), expected_of(model, clips, mask, drop=drop), atol=1e-4, rtol=1e-4
    )
    assert len(target.notes) == 1 and "sees frames of 28 x 28, of a tubelet the first" in target.notes[0]
    both = target_of(folder, teacher_frames="mean", teacher_layers="2")
    wanted = expected_of(model, clips, mask, drop=drop, layer=2, mean=True)
    torch.testing.assert_close(both.values(clips, mask), wanted, atol=1e-4, rtol=1e-4)
    assert "the mean over a tubelet's 2 frames" in both.notes[0]


def test_a_model_of_images_and_text(hf, folders):
    """Its vision part alone is held."""
    clips, mask = batch()
    target, model = target_of(folders("whole")), hf.AutoModel.from_pretrained(folders("whole")).eval()
    expected = expected_of(model.vision_model, clips, mask, drop=1)
    torch.testing.assert_close(target.values(clips, mask), expected, atol=1e-4, rtol=1e-4)
    assert target.state_bytes() < 4.1 * sum(one.numel() for one in model.vision_model.parameters())


def test_only_the_blocks_that_are_needed_count(folders):
    """4 images a clip, of 17 tokens: a block's products, attention, and the patches'."""
    block = 17 * (4 * 24 * 24 + 2 * 24 * 96) + 2 * 17 * 17 * 24
    patches = 16 * 3 * 7 * 7 * 24
    for layers, blocks in (("last", 3), ("1", 1), ("1,2", 2)):
        assert target_of(folders("dinov2"), teacher_layers=layers).macs() == 4 * (patches + blocks * block)
    mean = target_of(folders("dinov2"), teacher_layers="1", teacher_frames="mean")
    assert mean.macs() == 8 * (patches + block)
    held = [target_of(folders("dinov2"), teacher_layers=layers).state_bytes() for layers in ("1", "2", "3")]
    assert held == sorted(set(held))


def test_another_size(folders):
    """Positions are interpolated, the grid of patches is resampled, clips that are no squares stay so."""
    for name in ("clip", "siglip", "dinov2"):
        target = target_of(folders(name), teacher_size=42)
        assert target.encoder.grid == (4, 6, 6)
        assert any("resampled from 4 x 6 x 6 tokens to 4 x 4 x 4, trilinear" in note for note in target.notes)
        clips, mask = batch()
        assert target.values(clips, mask).shape == (2, mask.keep.shape[1], 24)
    wide = STUDENT.replace(img_size=(32, 48))
    target = target_of(folders("dinov2"), wide)
    assert target.encoder.size == (28, 42) and target.encoder.grid == (4, 4, 6)
    target.values(*batch(wide))


def test_bf16_and_identity(folders, tmp_path):
    clips, mask = batch()
    whole = target_of(folders("dinov2"))
    half = target_of(folders("dinov2"), teacher_dtype="bfloat16")
    torch.testing.assert_close(half.values(clips, mask), whole.values(clips, mask), atol=0.15, rtol=0)
    assert half.state_bytes() < 0.8 * whole.state_bytes()
    moved = tmp_path / "moved"
    folders("dinov2").rename(moved)
    again = target_of(moved)
    moved.rename(folders("clip").parent / "dinov2")
    assert again.identity == whole.identity == half.identity != target_of(folders("clip")).identity


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("mae", {}, r"gives no patch tokens to learn: a ViTMAEModel gives \[5, 24\] for .* 16 patches"),
        ("resnet", {}, "gives no patch tokens to learn: a ResNetModel has no patches"),
        ("bert", {}, "is a BertModel, which takes no images"),
        ("clip", {"teacher_layers": "4"}, "--teacher-layers 4: the teacher .* has 3 blocks"),
        ("clip", {"teacher_size": 30}, "--teacher-size 30 x 30: the teacher's patches of 7 do not divide it"),
        ("clip", {"teacher_attention": "flash3"}, "--teacher-attention flash3: a model of transformers has"),
    ],
)  # fmt: skip
def test_what_is_no_teacher(folders, name, settings, message):
    with pytest.raises(InputError, match=message) as error:
        target_of(folders(name), **settings)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_there(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((folders("dinov2") / "config.json").read_text())
    with pytest.raises(InputError, match="transformers cannot read it: .*model.safetensors"):
        target_of(tmp_path)
    state = load_file(folders("dinov2") / "model.safetensors")
    lost = next(name for name in state if "layer.1" in name and name.endswith("weight"))
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its weights lack .*\.1\."):
        target_of(tmp_path)


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(InputError, match=r"transformers, which is not installed: pip install 'vmae\[hf\]'"):
        target_of(tmp_path)
