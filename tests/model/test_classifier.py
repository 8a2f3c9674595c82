import pytest
import torch
import torch.nn.functional as F

from vmae import InputError, build_classifier
from vmae.config import IMAGENET_MEAN, IMAGENET_STD


def literal_features(model, clips, mean_pooling):
    """All tokens through the Conv3d, blocks, pooling."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    x = model.patch_embed(images) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    norm = model.fc_norm if mean_pooling else model.norm
    return F.layer_norm(x.mean(1) if mean_pooling else x[:, 0], norm.weight.shape, norm.weight, norm.bias, 1e-6)


@pytest.mark.parametrize("mean_pooling", [True, False])
@pytest.mark.parametrize("change", [{}, dict(learned_pos=True, init_values=0.1)])
def test_features_and_logits(tiny, clips_of, mean_pooling, change):
    config = tiny.replace(**change)
    model = build_classifier(config, 7, mean_pooling=mean_pooling).eval()
    clips = clips_of(config, 3)
    expected = literal_features(model, clips, mean_pooling)
    torch.testing.assert_close(model.features(clips), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(clips), expected @ model.head.weight.T + model.head.bias, atol=1e-5, rtol=1e-4)


def test_published_names_and_initialisation(tiny):
    model = build_classifier(tiny, 7, init_scale=0.001)
    names = {name for name, _ in model.named_parameters()}
    assert {"patch_embed.proj.weight", "fc_norm.weight", "head.weight", "blocks.1.attn.v_bias"} <= names
    assert not any(name.startswith(("norm.", "encoder.", "decoder.", "pos_embed")) for name in names)
    assert 0 < model.head.weight.abs().max() < 1e-4 and not model.head.bias.any()
    assert 0.015 < model.blocks[0].mlp.fc1.weight.std() < 0.025


def test_positions_train_when_learned(tiny, clips_of):
    model = build_classifier(tiny.replace(learned_pos=True), 3)
    model(clips_of(tiny, 2)).square().sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


def test_features_only_and_dropout(tiny, clips_of):
    assert build_classifier(tiny, 0)(clips_of(tiny)).shape == (2, 48)
    model, clips = build_classifier(tiny, 3, head_drop_rate=0.5), clips_of(tiny)
    assert not torch.equal(model(clips), model(clips))
    assert torch.equal(model.eval()(clips), model(clips))
    with pytest.raises(InputError, match="num_classes must be at least 0"):
        build_classifier(tiny, -1)
