import dataclasses

import pytest

from vmae import InputError, MaskConfig, ModelConfig, SpeedConfig

# embed_dim, depth, heads, decoder width, heads, patch, tokens of a 16 x 224 x 224 clip, parameters of encoder
# blocks' MLP
PUBLISHED = {
    "vit_s": (384, 12, 6, 192, 3, 16, 1568, 1536),
    "vit_b": (768, 12, 12, 384, 6, 16, 1568, 3072),
    "vit_l": (1024, 24, 16, 512, 8, 16, 1568, 4096),
    "vit_h": (1280, 32, 16, 512, 8, 16, 1568, 5120),
    "vit_g": (1408, 40, 16, 512, 8, 14, 2048, 6144),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_ones(name):
    c = ModelConfig.preset(name)
    hidden = int(c.embed_dim * c.mlp_ratio)
    got = (
        c.embed_dim,
        c.depth,
        c.num_heads,
        c.decoder_embed_dim,
        c.decoder_num_heads,
        c.patch_size,
        c.num_tokens,
        hidden,
    )
    assert got == PUBLISHED[name]
    assert c.decoder_depth == 4 and c.qkv_bias and c.layer_norm_eps == 1e-6 and not c.learned_pos


def test_overrides_and_round_trip():
    config = ModelConfig.preset("vit_g", img_size=[112, 224], num_frames=32)
    assert config.grid == (16, 8, 16) and config.image_hw == (112, 224)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.replace(depth=2).depth == 2 and config.tubelet_pixels == 1176


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(img_size=225), "height 225 is not divisible by the patch size 16; use 224 or 240"),
        (dict(img_size=(224, 8)), "width 8"),
        (dict(num_frames=15), "15 frames are not divisible by the tubelet size 2"),
        (dict(num_heads=5), "embed_dim 768 is not divisible by num_heads 5"),
        (dict(decoder_num_heads=5), "decoder_embed_dim 384"),
        (dict(depth=0), "depth must be a whole number from 1 to 256, not 0"),
        (dict(embed_dim=76.8), "embed_dim must be a whole number from 1 to 65,536, not 76.8"),
        (dict(img_size=(224, 224, 224)), "img_size must be 2 numbers, not"),
        (dict(img_size=8192), "2,097,152 tokens; a clip may have 1,048,576"),
        (dict(pos_grid=(8, 512, 512)), "at most 1,048,576 of them"),
        (dict(drop_path_rate=1.0), "drop_path_rate"),
        (dict(mlp_ratio=0.0), "mlp_ratio"),
        (dict(cos_attn=True, qk_scale=0.1), "qk_scale must be None"),
        (dict(patchsize=16), "unknown setting patchsize; known: .*patch_size"),
    ],
)
def test_bad_settings_are_named(change, words):
    with pytest.raises(InputError, match=words):
        ModelConfig.preset("vit_b", **change)


def test_unknown_preset_lists_the_known():
    with pytest.raises(
        InputError, match="unknown model preset 'vit_x'; known: vit_s, vit_b, vit_l, vit_h, vit_g"
    ):
        ModelConfig.preset("vit_x")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskConfig(encoder="cube"), "unknown encoder mask 'cube'; known: tube, random, frame"),
        (lambda: MaskConfig(decoder="cell"), "unknown decoder mask 'cell'"),
        (
            lambda: MaskConfig(encoder_ratio=1.0),
            "encoder_ratio must be a number at least 0 and below 1, not 1.0",
        ),
        (lambda: MaskConfig(decoder_ratio=-0.1), "decoder_ratio must be a number"),
        (lambda: SpeedConfig(backend="cuda"), "unknown backend 'cuda'"),
        (lambda: SpeedConfig(num_workers=-1), "num_workers"),
    ],
)
def test_bad_mask_and_speed_settings(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_configurations_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MaskConfig().encoder = "random"
    with pytest.raises(TypeError):
        ModelConfig(224)
