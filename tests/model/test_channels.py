"""Models of other channels than three, with statistics of their own: against the plain reference."""

import pytest
import torch

from vmae import DualMask, InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.config import IMAGENET_MEAN, IMAGENET_STD
from vmae.model.embed import statistics_of
from vmae.model.reference import build_reference
from vmae.train.metrics import trivial_losses
from vmae_kernels import Statistics, embed_visible, gather_tubelets, head_patch_loss, patch_loss
from vmae_kernels.tubelets import clip_grid, normalise

SIZE = dict(embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
SIZE |= dict(img_size=16, patch_size=4, num_frames=4)


def config_of(channels: int, **changes) -> ModelConfig:
    numbers = torch.linspace(0.3, 0.6, channels).tolist()
    stats = dict(channel_mean=numbers, channel_std=[0.5 * number for number in numbers])
    return ModelConfig.from_dict({**SIZE, "in_channels": channels, **stats, **changes})


def clips_of(config: ModelConfig, dtype=torch.uint8) -> torch.Tensor:
    shape = (2, config.num_frames, *config.image_hw, config.in_channels)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def masks(config: ModelConfig) -> DualMask:
    return DualMask.sample(2, config.grid, encoder_ratio=0.75, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4, 12])
def test_losses_and_gradients_are_those_of_the_reference(channels, normalize):
    config = config_of(channels)
    torch.manual_seed(0)
    model = build_pretrainer(config, normalize_target=normalize)
    torch.manual_seed(0)
    plain = build_reference(config, normalize_target=normalize)
    clips, mask = clips_of(config), masks(config)
    loss, expected = model(clips, mask), plain(clips, mask)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    expected.backward()
    grads = [one.encoder.patch_embed.proj.weight.grad for one in (model, plain)]
    assert grads[0].shape == (24, channels, 2, 4, 4)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    assert model.predict(clips, mask).shape[-1] == 2 * 4 * 4 * channels == config.tubelet_pixels


def test_packed_clips_of_other_channels():
    config = config_of(4)
    model, clips, mask = build_pretrainer(config), clips_of(config), masks(config)
    torch.testing.assert_close(model([clips], [mask]), model(clips, mask), atol=1e-6, rtol=1e-5)


def test_dtypes_of_the_same_values_give_the_same_loss():
    config = config_of(4)
    model, clips, mask = build_pretrainer(config), clips_of(config), masks(config)
    deep = (clips.int() * 257).to(torch.uint16)
    whole = clips.float() / 255
    losses = [model(one, mask).item() for one in (clips, deep, whole)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert trivial_losses(deep, mask, config) == pytest.approx(trivial_losses(clips, mask, config), rel=1e-4)
    classifier = build_classifier(config, 3).eval()
    logits = [classifier(one) for one in (clips, deep, whole)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[0], logits[2], atol=1e-5, rtol=1e-5)
    embedded = classifier.features_of_embedded(classifier.embed(deep))
    torch.testing.assert_close(embedded, classifier.features(deep), atol=1e-5, rtol=1e-5)


def test_three_channels_with_imagenets_numbers_stay_on_the_kernels_path_to_the_bit():
    usual = ModelConfig.from_dict(SIZE)
    named = usual.replace(channel_mean=IMAGENET_MEAN, channel_std=IMAGENET_STD)
    own = usual.replace(channel_mean=IMAGENET_MEAN, channel_std=(0.229, 0.224, 0.3))
    clips, mask = clips_of(usual), masks(usual)
    assert statistics_of(clips, usual) is statistics_of(clips, named) is None
    assert statistics_of(clips, own) == Statistics(IMAGENET_MEAN, (0.229, 0.224, 0.3))
    losses = []
    for config in (usual, named):
        torch.manual_seed(0)
        losses.append(build_pretrainer(config)(clips, mask))
    assert torch.equal(*losses)
    # The plain path's own formula gives the same numbers where the statistics are ImageNet's.
    stored = Statistics(IMAGENET_MEAN, IMAGENET_STD)
    weight, pos = torch.randn(8, 3, 2, 4, 4), torch.zeros(1, usual.num_tokens, 8)
    assert torch.equal(
        embed_visible(clips, mask.visible, weight, None, pos),
        embed_visible(clips, mask.visible, weight, None, pos, statistics=stored),
    )
    predicted, tokens = torch.randn(*mask.target.shape, 96), (clips, mask.target, mask.target_weight)
    assert torch.equal(patch_loss(predicted, *tokens), patch_loss(predicted, *tokens, statistics=stored))


def test_stored_floats_of_three_channels_are_told_from_normalised_ones():
    config = ModelConfig.from_dict(SIZE)
    model, mask = build_pretrainer(config), masks(config)
    clips = clips_of(config)
    normalised = normalise(clips).permute(0, 4, 1, 2, 3)
    losses = [model(one, mask).item() for one in (clips, clips.float() / 255, normalised)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_the_kernels_refuse_by_name():
    config, mask = config_of(1), masks(config_of(1))
    stats, clips = Statistics(*config.statistics), clips_of(config)
    weight, pos = torch.randn(8, 1, 2, 4, 4), torch.zeros(1, config.num_tokens, 8)
    with pytest.raises(ValueError, match="embed_visible: the Triton kernels read 3 channels with ImageNet"):
        embed_visible(clips, mask.visible, weight, None, pos, backend="triton", statistics=stats)
    rows, tokens = torch.randn(*mask.target.shape, 32), (clips, mask.target, mask.target_weight)
    with pytest.raises(ValueError, match="^patch_loss: the Triton kernels"):
        patch_loss(rows, *tokens, backend="triton", statistics=stats)
    head = torch.randn(32, 32)
    with pytest.raises(ValueError, match="head_patch_loss: the Triton kernels"):
        head_patch_loss(rows, head, None, *tokens, backend="triton", statistics=stats)


def test_shapes_that_do_not_fit_are_named():
    config = config_of(4)
    model, mask = build_pretrainer(config), masks(config)
    with pytest.raises(
        InputError, match=r"a model of 4 channels: .* uint8, uint16 or float32 \[B, T, H, W, 4"
    ):
        model(clips_of(config)[..., :3], mask)
    with pytest.raises(InputError, match="4 channels"):
        build_classifier(config, 2)(torch.zeros(1, 4, 4, 16, 16))
    stats = Statistics(*config.statistics)
    with pytest.raises(ValueError, match=r"uint8, uint16 or float32 \[B, T, H, W, 4\], not int64"):
        clip_grid(clips_of(config).long(), 4, 2, stats)
    with pytest.raises(ValueError, match=r"weight must be \[D, 4, t, p, p\]"):
        embed_visible(
            clips_of(config), mask.visible, torch.randn(8, 3, 2, 4, 4), None, torch.zeros(1), statistics=stats
        )
    assert gather_tubelets(clips_of(config), mask.visible, 4, 2, stats).shape[-1] == 4


def test_settings():
    assert ModelConfig.from_dict(SIZE).statistics == (IMAGENET_MEAN, IMAGENET_STD)
    plain = ModelConfig.from_dict({**SIZE, "in_channels": 2})
    assert plain.statistics == ((0.0, 0.0), (1.0, 1.0)) and plain.clip_bytes == 2 * 4 * 16 * 16
    with pytest.raises(InputError, match="channel_mean has 1 numbers, but clips have 2 channels"):
        ModelConfig.from_dict({**SIZE, "in_channels": 2, "channel_mean": [0.5], "channel_std": [1.0]})
    with pytest.raises(InputError, match="belong together"):
        ModelConfig.from_dict({**SIZE, "in_channels": 1, "channel_mean": [0.5]})
    with pytest.raises(InputError, match="channel_std must be a number above 0"):
        ModelConfig.from_dict({**SIZE, "channel_mean": IMAGENET_MEAN, "channel_std": [1.0, 0.0, 1.0]})
    assert ModelConfig.from_dict(config_of(12).to_dict()) == config_of(12)
