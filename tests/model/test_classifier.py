import pytest
import torch
import torch.nn.functional as F

from vmae import InputError, build_classifier
from vmae.config import IMAGENET_MEAN, IMAGENET_STD


def literal_pool(pool, x):
    """A learned query attends to all tokens, a head after the other."""
    x = F.layer_norm(x, pool.norm.weight.shape, pool.norm.weight, pool.norm.bias, 1e-6)
    k, v = (x @ pool.kv.weight.T + pool.kv.bias).chunk(2, -1)
    width = x.shape[2] // pool.num_heads
    heads = []
    for head in range(pool.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = (k[..., part] @ pool.query[0, 0, part]) / width**0.5
        heads.append((scores.softmax(1)[..., None] * v[..., part]).sum(1))
    return torch.cat(heads, -1) @ pool.proj.weight.T + pool.proj.bias


def literal_features(model, clips, pooling):
    """All tokens through the Conv3d, blocks, pooling."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    x = model.patch_embed(images) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    norm = model.norm if pooling == "first" else model.fc_norm
    pooled = {
        "mean": lambda: x.mean(1),
        "first": lambda: x[:, 0],
        "attentive": lambda: literal_pool(model.pool, x),
    }[pooling]()
    return F.layer_norm(pooled, norm.weight.shape, norm.weight, norm.bias, 1e-6)


@pytest.mark.parametrize("pooling", ["mean", "first", "attentive"])
@pytest.mark.parametrize("change", [{}, dict(learned_pos=True, init_values=0.1)])
def test_features_and_logits(tiny, clips_of, pooling, change):
    config = tiny.replace(**change)
    model = build_classifier(config, 7, pooling=pooling).eval()
    clips = clips_of(config, 3)
    expected = literal_features(model, clips, pooling)
    torch.testing.assert_close(model.features(clips), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model(clips), expected @ model.head.weight.T + model.head.bias, atol=1e-5, rtol=1e-4
    )


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


DROP, ATTN_DROP, HEAD_DROP = 0.2, 0.3, 0.4


def literal_block(block, x, drop):
    """modeling_finetune.py of VideoMAE and VideoMAE V2: dropout of the softmax matrix, after proj, after fc2
    (not between fc1 and fc2)."""
    attn, heads = block.attn, block.attn.num_heads
    h = F.layer_norm(x, block.norm1.weight.shape, block.norm1.weight, block.norm1.bias, 1e-6)
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])
    q, k, v = F.linear(h, attn.qkv.weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = drop((q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1), ATTN_DROP)
    x = x + block.gamma_1 * drop(attn.proj((weights @ v).transpose(1, 2).flatten(2)), DROP)
    h = F.layer_norm(x, block.norm2.weight.shape, block.norm2.weight, block.norm2.bias, 1e-6)
    return x + block.gamma_2 * drop(block.mlp.fc2(F.gelu(block.mlp.fc1(h))), DROP)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropouts_are_where_the_published_models_have_them(tiny, clips_of, recompute, monkeypatch):
    """Each is replaced by a factor of its own rate, so that none can stand elsewhere, or be left out."""
    model = build_classifier(
        tiny.replace(init_values=0.7),
        3,
        drop_rate=DROP,
        attn_drop_rate=ATTN_DROP,
        head_drop_rate=HEAD_DROP,
        attention="softmax",
        recompute=recompute,
    )
    clips = clips_of(tiny, 3)

    def scaled(x, rate=0.5, training=True, inplace=False):
        return x * (1 + rate) if training else x

    def literal(drop):
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        x = model.patch_embed(((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3)) + model.pos_embed
        x = drop(x, DROP)
        for block in model.blocks:
            x = literal_block(block, x, drop)
        pooled = F.layer_norm(x.mean(1), model.fc_norm.weight.shape, None, None, 1e-6)
        return model.head(drop(pooled, HEAD_DROP))

    monkeypatch.setattr(torch.nn.functional, "dropout", scaled)
    torch.testing.assert_close(model(clips), literal(scaled), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.eval()(clips), literal(lambda x, rate: x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "softmax", "sdpa_math"])
def test_attention_drops_weights_and_keeps_their_mean(tiny, clips_of, attention):
    torch.manual_seed(0)
    model = build_classifier(tiny, 3, attn_drop_rate=0.5, attention=attention)
    attn, x = model.blocks[0].attn, torch.randn(1, 64, 48)
    with torch.no_grad():
        found = torch.stack([attn(x) for _ in range(400)])
        attn.eval()
        torch.testing.assert_close(found.mean(0), attn(x), atol=0.03, rtol=0)
        assert found.std(0).mean() > 1e-3


def test_without_rates_nothing_is_drawn(tiny, clips_of):
    model, clips = build_classifier(tiny, 3), clips_of(tiny)
    assert model.pos_dropout is None and all(not block.draws for block in model.blocks)
    state = torch.get_rng_state()
    model(clips)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_has_no_dropout_is_refused_by_name(tiny, clips_of):
    model = build_classifier(tiny, 3, attn_drop_rate=0.5, attention="sdpa_flash")
    with pytest.raises(
        InputError, match="'sdpa_flash' cannot run .*dropout.*: has no dropout. These can: sdpa"
    ):
        model(clips_of(tiny))
    assert model.eval()(clips_of(tiny)).shape == (2, 3)
    for wrong in (dict(drop_rate=1.0), dict(attn_drop_rate=-0.1)):
        with pytest.raises(InputError, match=next(iter(wrong))):
            build_classifier(tiny, 3, **wrong)


@pytest.mark.parametrize(
    "pooling, trained", [("mean", {"fc_norm", "head"}), ("attentive", {"fc_norm", "head", "pool"})]
)
def test_a_probe_trains_its_head_only(tiny, clips_of, pooling, trained):
    model, clips = build_classifier(tiny, 3, pooling=pooling), clips_of(tiny)
    before = model(clips)
    model.freeze_encoder()
    loss = model(clips).square().sum()
    loss.backward()
    assert torch.equal(before, model(clips))
    grads = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert grads == trained == {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_an_attentive_probe_has_names_of_its_own(tiny):
    names = {
        name
        for name, _ in build_classifier(tiny, 3, pooling="attentive").named_parameters()
        if "pool" in name
    }
    layers = [f"pool.{layer}.{kind}" for layer in ("norm", "kv", "proj") for kind in ("weight", "bias")]
    assert names == {"pool.query", *layers}


def test_dropped_paths_and_layer_scale(tiny, clips_of):
    model, clips = build_classifier(tiny.replace(drop_path_rate=0.5, init_values=0.1), 3), clips_of(tiny, 4)
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.5]
    assert model.blocks[0].gamma_1.tolist() == pytest.approx([0.1] * 48)
    assert not torch.equal(model(clips), model(clips)) and torch.equal(model.eval()(clips), model(clips))


def test_clips_of_another_size_are_refused(tiny, clips_of):
    with pytest.raises(InputError, match="do not fit a model of \\(8, 64, 64\\)"):
        build_classifier(tiny, 3)(clips_of(tiny.replace(num_frames=4)))
    for wrong in (dict(pooling="max"), dict(head_drop_rate=1.0)):
        with pytest.raises(InputError):
            build_classifier(tiny, 3, **wrong)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_clips_embedded_in_parts_have_the_same_features(tiny, clips_of, kind):
    model = build_classifier(tiny, 0).eval()
    clips = clips_of(tiny, 2)
    if kind == "float":
        clips = clips.float().permute(0, 4, 1, 2, 3) / 255
    frames = 1 if kind == "uint8" else 2
    with torch.no_grad():
        parts = torch.cat([model.embed(part) for part in clips.split([2, 6], frames)], 1)
        torch.testing.assert_close(
            model.features_of_embedded(parts), model.features(clips), atol=1e-5, rtol=1e-4
        )
