"""A frozen encoder's latents: of any size, patch, grid and dtype; of one layer or several; what is no
encoder."""

import json

import pytest
import torch
import torch.nn.functional as F

from vmae import DualMask, InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.config import SpeedConfig
from vmae.model.cost import classifier_macs
from vmae.targets.building import build_target
from vmae.targets.frozen import fitted, frames_of, nearest, regridded
from vmae.targets.settings import TargetConfig, Wanted

STUDENT = ModelConfig.preset("vit_tiny", img_size=32, num_frames=8, patch_size=8)
TINY = dict(embed_dim=48, depth=3, num_heads=3, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
RATIO = dict(encoder_ratio=0.75, decoder_ratio=0.5)


def randomised(model):
    """All parameters random: nothing that is left out goes unseen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
    return model


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """`teachers(name, **changes)`: a pre-trained teacher's file (name "tuned": a fine-tuned one's)."""
    folder, made = tmp_path_factory.mktemp("teachers"), {}

    def path(name="pretrained", **changes):
        key = json.dumps([name, changes])
        if key not in made:
            config = ModelConfig(**{**TINY, "img_size": 32, "num_frames": 8, "patch_size": 8, **changes})
            model = build_pretrainer(config) if name == "pretrained" else build_classifier(config, 3)
            made[key] = folder / f"{len(made)}.pth"
            export_weights(
                made[key], randomised(model).state_dict(), config={"model": config.to_dict(), "stride": 2}
            )
        return made[key]

    return path


def target_of(path, student=STUDENT, **settings):
    settings = {"teacher_dtype": "float32", **settings}
    return build_target(Wanted(student, TargetConfig(name="teacher", teacher=str(path), **settings)))


def batch(config=STUDENT, count=2):
    generator = torch.Generator().manual_seed(1)
    shape = (count, config.num_frames, *config.image_hw, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return clips, DualMask.sample(count, config.grid, **RATIO, generator=generator)


def encoder_of(path, **changes):
    """The teacher as `features` and others build it, for comparison."""
    from vmae.checkpoint.models import to_model
    from vmae.checkpoint.source import read_checkpoint

    return to_model(read_checkpoint(path), "encoder", changes)[0]


def counted(tokens, mask):
    rows = mask.target.long()[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, rows)


def normed(x):
    return F.layer_norm(x, x.shape[-1:])


# --- latents ---


def test_latents_are_those_of_the_encoder_at_the_counted_tokens(teachers):
    path, (clips, mask) = teachers(), batch()
    target = target_of(path)
    with torch.no_grad():
        expected = normed(counted(encoder_of(path).tokens(clips), mask))
    found = target.values(clips, mask)
    assert found.shape == (2, mask.keep.shape[1], 48) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and target.width == 48 and target.notes == ()


def test_layers(teachers):
    path, (clips, mask) = teachers(), batch()
    encoder = encoder_of(path)
    with torch.no_grad():
        after = [counted(tokens, mask) for tokens in encoder.layer_tokens(clips)]
        end = counted(encoder.tokens(clips), mask)
    for layers, expected in (
        ("last", normed(end)),
        ("3", normed(after[2])),
        ("1", normed(after[0])),
        ("1,3", normed((normed(after[0]) + normed(after[2])) / 2)),
    ):
        torch.testing.assert_close(target_of(path, teacher_layers=layers).values(clips, mask), expected)
    plain = target_of(path, teacher_layers="1,3", normalize_latents=False).values(clips, mask)
    torch.testing.assert_close(plain, (after[0] + after[2]) / 2)
    assert not torch.allclose(normed(end), normed(after[2]), atol=0.1)  # the last norm has weights


def test_only_the_blocks_that_are_needed_run_and_count(teachers, monkeypatch):
    from vmae.model.blocks import Block

    config = ModelConfig(**TINY, img_size=32, num_frames=8, patch_size=8)
    calls, plain = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *x: calls.append(self) or plain(self, *x))
    held = []
    for layers, blocks in (("1", 1), ("1,2", 2), ("last", 3)):
        target = target_of(teachers(), teacher_layers=layers)
        calls.clear()
        target.values(*batch())
        assert len(calls) == blocks
        assert target.macs() == classifier_macs(config.replace(depth=blocks), 0)
        held.append(target.state_bytes())
    assert held == sorted(set(held))


def test_slices_of_clips_change_nothing(teachers):
    clips, mask = batch(count=5)
    whole = target_of(teachers()).values(clips, mask)
    target = target_of(teachers(), teacher_batch=2)
    seen, plain = [], target.encoder.layers
    target.encoder.layers = lambda clips: seen.append(len(clips)) or plain(clips)
    torch.testing.assert_close(target.values(clips, mask), whole)
    assert seen == [2, 2, 1]


def test_bf16_weights_are_cast_once(teachers):
    """Held in bf16, the numbers are those of autocast on float32 weights, to the bit, in half the bytes."""
    clips, mask = batch()
    target, whole = target_of(teachers(), teacher_dtype="bfloat16"), target_of(teachers())
    found = target.values(clips, mask)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = normed(counted(encoder_of(teachers()).tokens(clips), mask).float())
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, whole.values(clips, mask), atol=0.1, rtol=0)
    assert target.state_bytes() < 0.8 * whole.state_bytes()  # embedding and positions stay float32
    with torch.autocast("cpu", torch.bfloat16):  # of the student's run: the teacher's own dtype counts
        assert torch.equal(whole.values(clips, mask), target_of(teachers()).values(clips, mask))


# --- another size, patch, grid ---


@pytest.mark.parametrize(
    "changes, settings, grid, notes",
    [
        # positions of 16 frames of 48 pixels, built for the student's 8 of 32
        (dict(img_size=48, num_frames=16), {}, (4, 4, 4), ["positions interpolated from 8 x 6 x 6 tokens"]),
        (dict(learned_pos=True, img_size=48), {}, (4, 4, 4), ["positions interpolated"]),
        # 32 pixels are 5 1/3 patches of 6
        (
            dict(patch_size=6, img_size=36),
            {},
            (4, 5, 5),
            ["as 8 x 30 x 30", "positions", "resampled from 4 x 5 x 5 tokens to 4 x 4 x 4"],
        ),
        (dict(patch_size=16), {}, (4, 2, 2), ["resampled from 4 x 2 x 2 tokens"]),
        (dict(tubelet_size=4), {}, (2, 4, 4), ["resampled from 2 x 4 x 4 tokens"]),
        # three frames a tubelet: 9 of the student's 8
        (dict(tubelet_size=3, num_frames=9), {}, (3, 4, 4), ["as 9 x 32 x 32", "resampled"]),
        (
            dict(),
            {"teacher_size": (64, 48)},
            (4, 8, 6),
            ["as 8 x 64 x 48", "positions", "resampled from 4 x 8 x 6"],
        ),
    ],
)  # fmt: skip
def test_a_teacher_of_another_size(teachers, changes, settings, grid, notes):
    target = target_of(teachers(**changes), **settings)
    assert target.encoder.grid == grid and len(target.notes) == len(notes)
    for said, note in zip(target.notes, notes):
        assert said.startswith("teacher: ") and note in said
    clips, mask = batch()
    found = target.values(clips, mask)
    with torch.no_grad():
        encoder = encoder_of(
            teachers(**changes),
            num_frames=target.encoder.module.config.num_frames,
            img_size=target.encoder.module.config.img_size,
        )
        tokens = encoder.tokens(fitted(clips, encoder.config))
    torch.testing.assert_close(found, normed(counted(regridded(tokens, grid, (4, 4, 4)), mask)))


def test_fitted_clips():
    config = ModelConfig(**TINY, img_size=(48, 64), num_frames=4, patch_size=8)
    colour = torch.tensor([10, 100, 200], dtype=torch.uint8)
    clips = colour.expand(2, 8, 32, 32, 3).clone()
    clips[:, 4:] += 20  # the second half
    found = fitted(clips, config)
    assert found.shape == (2, 3, 4, 48, 64)
    expected = (
        torch.stack([colour, colour, colour + 20, colour + 20]) / 255
    )  # frames of the middle of each fourth
    torch.testing.assert_close(frames_of(found, config)[..., 20, 30], expected.expand(2, -1, -1))
    same = ModelConfig(**TINY, img_size=32, num_frames=8, patch_size=8)
    assert fitted(clips, same) is clips
    floats = fitted(clips, config.replace(num_frames=8))  # the other form of clips goes the same way
    torch.testing.assert_close(fitted(floats, config), found, atol=1e-5, rtol=1e-5)


def test_grids():
    x = torch.arange(2 * 3 * 4.0).view(1, 24, 1)
    assert regridded(x, (2, 3, 4), (2, 3, 4)) is x
    up = regridded(x, (2, 3, 4), (4, 6, 8))
    assert up.shape == (1, 192, 1) and torch.allclose(up.mean(), x.mean())
    assert torch.allclose(regridded(up, (4, 6, 8), (1, 1, 1)), x.mean())
    assert [nearest(32, step) for step in (8, 14, 20, 100)] == [32, 28, 40, 100]


# --- the rest of a target ---


def test_losses(teachers):
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    for name, expected in {
        "smooth_l1": F.smooth_l1_loss(a, b, reduction="none").mean(-1),
        "l1": (a - b).abs().mean(-1),
        "l2": (a - b).square().mean(-1),
        "cosine": 1 - F.cosine_similarity(a, b, dim=-1),
    }.items():
        torch.testing.assert_close(target_of(teachers(), target_loss=name).compare(a, b), expected)


def test_a_step(teachers):
    """The student's loss goes down, the teacher stays as it is; known values are taken as they are."""
    target, (clips, mask) = target_of(teachers()), batch()
    before = {name: value.clone() for name, value in target.encoder.module.state_dict().items()}
    torch.manual_seed(0)
    model = build_pretrainer(STUDENT, target=target)
    assert not any("teacher" in name for name in model.state_dict()) and model.decoder.head.out_features == 48
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(clips, mask)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = target.encoder.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in target.encoder.module.parameters())
    with torch.no_grad():
        known = model(clips, mask, values=target.values(clips, mask))
        assert torch.equal(known, model(clips, mask))
        assert model(clips, mask, values=torch.zeros_like(target.values(clips, mask))) != known
    assert target.trivial(clips, mask)["zero"] == pytest.approx(0.34, abs=0.1)


def test_identity_is_that_of_the_weights(teachers, tmp_path):
    moved = tmp_path / "moved.pth"
    moved.write_bytes(teachers().read_bytes())
    one = target_of(teachers())
    assert one.identity == target_of(moved).identity == target_of(teachers(), teacher_layers="1").identity
    assert one.identity["weights"] != target_of(teachers(learned_pos=True)).identity["weights"]


def test_a_fine_tuned_teacher(teachers):
    path, (clips, mask) = teachers("tuned"), batch()
    target = target_of(path)
    assert len(target.notes) == 1 and "its last norm on the mean over tokens" in target.notes[0]
    with torch.no_grad():
        expected = normed(counted(encoder_of(path).tokens(clips), mask))
    torch.testing.assert_close(target.values(clips, mask), expected)


# --- what is wrong ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"teacher_layers": "4"}, "--teacher-layers 4: the teacher .* has 3 blocks, 1 to 3"),
        ({"teacher_layers": "1,9"}, "--teacher-layers 1,9: the teacher"),
        ({"teacher_size": 30}, "--teacher: image height 30 is not divisible by the patch size 8"),
        ({"teacher_attention": "flash9"}, "unknown attention"),
        ({"teacher_init_size": 48}, "--teacher: .*--teacher-init-frames and --teacher-init-size are for"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(teachers, settings, message):
    with pytest.raises(InputError, match=message):
        target_of(teachers(), **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"teacher_layers": "0"}, "teacher_layers must be last, or numbers of blocks from 1 on"),
        ({"teacher_layers": "first"}, "teacher_layers must be last"),
        ({"teacher_layers": "3,"}, "teacher_layers must be last"),
        ({"target_loss": "huber"}, "unknown target loss 'huber'; known: smooth_l1, l1, l2, cosine"),
        ({"teacher_dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"teacher_frames": "all"}, "unknown teacher frames 'all'; known: first, mean"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(InputError, match=message):
        TargetConfig(name="teacher", teacher="run", **settings)


def test_a_teacher_of_another_target():
    for settings in ({"teacher": "run"}, {"teacher_layers": "3"}, {"teacher_batch": 4}):
        flag = next(iter(settings)).replace("_", "-")
        with pytest.raises(InputError, match=f"--{flag} is of --target teacher, and the target is pixels"):
            TargetConfig(**settings)
    assert TargetConfig(name="teacher", teacher_layers=3) == TargetConfig(name="teacher", teacher_layers="3")


def test_no_teacher():
    with pytest.raises(InputError, match="--target teacher needs one: --teacher CHECKPOINT"):
        build_target(Wanted(STUDENT, TargetConfig(name="teacher")))


def test_a_teacher_that_is_no_encoder(tmp_path):
    from vmae.model.temporal_head import TemporalHead

    def refused(message, path, **settings):
        with pytest.raises(InputError, match=message) as error:
            target_of(path, **settings)
        assert "\n" not in str(error.value)

    refused("--teacher: .*missing", tmp_path / "missing.pth")
    layer = torch.nn.Linear(3, 3)
    torch.save({"head.weight": torch.ones(3, 4)}, tmp_path / "head.pth")
    refused("holds no encoder: it has head.weight", tmp_path / "head.pth")
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pth")
    refused("--teacher: ", tmp_path / "optimizer.pth")
    head = TemporalHead(8, 3)
    torch.save({"model": head.state_dict()}, tmp_path / "temporal.pth")
    refused("holds no encoder", tmp_path / "temporal.pth")
    odd = ModelConfig(**TINY, img_size=32, num_frames=8, patch_size=8)
    torch.save(build_pretrainer(odd).state_dict(), tmp_path / "silent.pth")
    refused("does not say which architecture it is of; name it with --teacher-model", tmp_path / "silent.pth")
    refused("--teacher: ", tmp_path / "silent.pth", teacher_model="vit_b")


def test_attention_that_does_not_run_here(teachers):
    target = target_of(teachers(), teacher_attention="sdpa_cudnn")
    with pytest.raises(InputError, match="sdpa_cudnn"):
        target.to(torch.device("cpu"))
    target_of(teachers(), teacher_attention="softmax").to(torch.device("cpu"))


def test_a_teacher_without_settings_of_its_own(teachers, tmp_path):
    """A file that does not say what it is: the preset and the clips that are named."""
    config = ModelConfig.preset("vit_tiny", img_size=32, num_frames=8, patch_size=16)
    torch.save(randomised(build_pretrainer(config)).state_dict(), tmp_path / "plain.pth")
    student = ModelConfig.preset("vit_tiny", img_size=32, num_frames=8, patch_size=16)
    target = target_of(tmp_path / "plain.pth", student, teacher_model="vit_tiny")
    assert any("--teacher-init-frames and --teacher-init-size say otherwise" in note for note in target.notes)
    assert target.identity["model"]["positions"] == [8, 14, 14]
    own = {"teacher_model": "vit_tiny", "teacher_init_frames": 8, "teacher_init_size": 32}
    told = target_of(tmp_path / "plain.pth", student, **own)
    assert told.notes == () and told.identity["model"]["positions"] == [4, 2, 2]
    assert SpeedConfig().attention == "auto"
