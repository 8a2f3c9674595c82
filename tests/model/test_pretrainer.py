import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vmae import DualMask, InputError, MaskConfig, ModelConfig, build_pretrainer, build_reference
from vmae.config import IMAGENET_MEAN, IMAGENET_STD
from vmae.masking import DECODER_MASKS, ENCODER_MASKS
from vmae.model.cost import masked_macs

SMALL = dict(
    img_size=64,
    num_frames=8,
    embed_dim=48,
    depth=2,
    num_heads=3,
    decoder_embed_dim=32,
    decoder_depth=2,
    decoder_num_heads=2,
)
# Each differs from the first in one way that a real checkpoint may: see the key.
ARCHITECTURES = {
    "plain": {},
    "patch 14, ViT-g's MLP": dict(img_size=56, patch_size=14, mlp_ratio=48 / 11, embed_dim=44, num_heads=2),
    "head dim 88": dict(embed_dim=176, num_heads=2),
    "layer scale": dict(init_values=0.1),
    "learned positions": dict(learned_pos=True),
    "cosine attention": dict(cos_attn=True),
    "no q and v bias, own scale": dict(qkv_bias=False, qk_scale=0.2),
    "rectangle": dict(img_size=(32, 96)),
    "5 token frames": dict(num_frames=10),
    "tubelets of 4 frames": dict(tubelet_size=4, num_frames=16),
    "one block in the decoder": dict(decoder_depth=1, cos_attn=True, init_values=0.1),
}
MASKS = {
    "dual": MaskConfig(encoder_ratio=0.75),
    "dual 25 %": MaskConfig(encoder_ratio=0.75, decoder_ratio=0.25),
    "dual 75 %": MaskConfig(encoder_ratio=0.5, decoder_ratio=0.75),
    "encoder only": MaskConfig(encoder_ratio=0.75, decoder="none"),
    "random": MaskConfig(encoder="random", encoder_ratio=0.75, decoder="random"),
    "frame": MaskConfig(encoder="frame", encoder_ratio=0.5, decoder="frame"),
}
CASES = [(name, "dual") for name in ARCHITECTURES] + [("plain", name) for name in MASKS if name != "dual"]


def pair(config: ModelConfig, **options):
    """The fast model and the reference with the same weights, all of them random (norms and biases too)."""
    fast, plain = build_pretrainer(config, **options), build_reference(config, **options)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def draw(config: ModelConfig, mask: MaskConfig, batch: int = 3) -> DualMask:
    return DualMask.sample(batch, config.grid, **mask.to_dict(), generator=torch.Generator().manual_seed(2))


def gradients(model, clips, mask):
    loss = model(clips, mask)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture, masking", CASES)
def test_loss_gradients_and_predictions_equal_the_reference(architecture, masking, clips_of):
    config = ModelConfig(**{**SMALL, **ARCHITECTURES[architecture]})
    fast, plain = pair(config, normalize_target=masking != "dual 25 %")
    clips, mask = clips_of(config, 3), draw(config, MASKS[masking])
    loss, grads = gradients(fast, clips, mask)
    expected, expected_grads = gradients(plain, clips, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert loss.dtype == torch.float32 and grads.keys() == expected_grads.keys()
    for name, gradient in grads.items():
        error = (gradient - expected_grads[name]).norm() / expected_grads[name].norm()
        assert error < 1e-4, name
    torch.testing.assert_close(fast.predict(clips, mask), plain.predict(clips, mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", [True, False])
def test_stochastic_depth_draws_what_the_reference_draws(recompute, clips_of):
    config = ModelConfig(**SMALL, drop_path_rate=0.5)
    plain, fast = build_reference(config), build_pretrainer(config, recompute=recompute)
    fast.load_state_dict(plain.state_dict())
    clips, mask = clips_of(config, 3), draw(config, MASKS["dual"])
    found = []
    for model in (fast, plain):
        torch.manual_seed(3)
        found.append(gradients(model.train(), clips, mask))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_reference_takes_the_published_booleans(tiny, clips_of):
    plain, clips, mask = build_reference(tiny), clips_of(tiny, 3), draw(tiny, MASKS["dual"])
    assert torch.equal(plain(clips, mask), plain(clips, mask.to_bool()))


def test_normalised_float_clips_give_the_same(tiny, clips_of):
    fast, plain = pair(tiny)
    clips, mask = clips_of(tiny, 3), draw(tiny, MASKS["dual"])
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    floats = ((clips / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()
    for model in (fast, plain):
        torch.testing.assert_close(model(floats, mask), model(clips, mask), rtol=1e-5, atol=0)


def test_bfloat16_autocast_stays_near_float32(tiny, clips_of):
    fast, _ = pair(tiny)
    clips, mask = clips_of(tiny, 3), draw(tiny, MASKS["dual"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fast(clips, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, fast(clips, mask), rtol=2e-2, atol=0)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in fast.parameters())


@pytest.mark.parametrize("decoder", DECODER_MASKS)
@pytest.mark.parametrize("encoder", ENCODER_MASKS)
def test_only_visible_and_counted_tokens_are_computed(tiny, clips_of, encoder, decoder):
    """What the forward multiplies is what the paper calculation says of visible and counted tokens, not of
    all: for every mask. A run's utilisation is counted from it."""
    mask = MaskConfig(encoder=encoder, encoder_ratio=0.75, decoder=decoder, decoder_ratio=0.5)
    fast = build_pretrainer(tiny, backend="torch", attention="softmax")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fast(clips_of(tiny, 2), draw(tiny, mask, batch=2))
    assert counter.get_total_flops() == 2 * 2 * masked_macs(tiny, mask)


def test_unseen_tokens_do_not_matter_to_the_encoder_nor_dropped_ones_to_the_loss(tiny, clips_of):
    fast, clips, mask = build_pretrainer(tiny), clips_of(tiny, 1), draw(tiny, MASKS["dual"], batch=1)
    before_code, before_loss = fast.encode(clips, mask), fast(clips, mask)
    hidden, dropped = mask.to_bool()
    neither = hidden & dropped
    per_token = (
        neither.view(1, *tiny.grid).repeat_interleave(2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)
    )
    changed = torch.where(per_token[..., None], 255 - clips, clips)
    assert torch.equal(fast.encode(changed, mask), before_code)
    assert torch.equal(fast(changed, mask), before_loss)


@pytest.mark.parametrize("name", ["vit_s", "vit_b", "vit_l", "vit_h", "vit_g"])
def test_names_and_shapes_are_the_published_ones(name):
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        fast, plain = build_pretrainer(config), build_reference(config)
    d, dd, p, t = config.embed_dim, config.decoder_embed_dim, config.patch_size, config.tubelet_pixels
    expected = {
        "mask_token": (1, 1, dd),
        "encoder_to_decoder.weight": (dd, d),
        "encoder.patch_embed.proj.weight": (d, 3, 2, p, p),
        "encoder.patch_embed.proj.bias": (d,),
        "encoder.norm.weight": (d,),
        "encoder.norm.bias": (d,),
        "decoder.norm.weight": (dd,),
        "decoder.norm.bias": (dd,),
        "decoder.head.weight": (t, dd),
        "decoder.head.bias": (t,),
    }
    for half, depth, width in (("encoder", config.depth, d), ("decoder", 4, dd)):
        hidden = int(width * config.mlp_ratio)
        for i in range(depth):
            block = {
                "norm1.weight": (width,),
                "norm1.bias": (width,),
                "norm2.weight": (width,),
                "norm2.bias": (width,),
                "attn.q_bias": (width,),
                "attn.v_bias": (width,),
                "attn.qkv.weight": (3 * width, width),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "mlp.fc1.weight": (hidden, width),
                "mlp.fc1.bias": (hidden,),
                "mlp.fc2.weight": (width, hidden),
                "mlp.fc2.bias": (width,),
            }
            expected |= {f"{half}.blocks.{i}.{key}": shape for key, shape in block.items()}
    for model in (fast, plain):
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_initialisation_is_the_published_one():
    model = build_pretrainer(ModelConfig.preset("vit_tiny"))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            fan_out, fan_in = module.weight.shape
            # encoder_to_decoder alone keeps torch's default, uniform in 1 / sqrt(fan in).
            bound = (6 / (fan_in + fan_out)) ** 0.5
            if name == "encoder_to_decoder":
                bound = fan_in**-0.5
            assert 0.98 * bound < module.weight.abs().max() <= bound, name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
    assert 0 < model.mask_token.abs().max() <= 0.02
    assert not model.encoder.blocks[0].attn.q_bias.any()
    torch.manual_seed(0)
    one = build_pretrainer(ModelConfig.preset("vit_tiny")).state_dict()
    torch.manual_seed(0)
    two = build_reference(ModelConfig.preset("vit_tiny")).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_wrong_input_is_refused_with_both_shapes(tiny, clips_of):
    model = build_pretrainer(tiny)
    mask = draw(tiny, MASKS["dual"], batch=2)
    with pytest.raises(InputError, match=r"\[2, 16, 64, 64, 3\].*\(8, 64, 64\)"):
        model(clips_of(tiny.replace(num_frames=16)), mask)
    with pytest.raises(InputError, match="a mask of 2 clips of 64 tokens does not fit 3 clips"):
        model(clips_of(tiny, 3), mask)
    with pytest.raises(InputError, match="of 1568 tokens"):
        model(clips_of(tiny, 2), DualMask.sample(2, (8, 14, 14)))


def test_two_training_steps_lower_the_loss(tiny, clips_of):
    model, clips, mask = build_pretrainer(tiny), clips_of(tiny, 2), draw(tiny, MASKS["dual"], batch=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(clips, mask)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_compiles_without_a_graph_break(tiny, clips_of):
    model, clips, mask = build_pretrainer(tiny), clips_of(tiny, 2), draw(tiny, MASKS["dual"], batch=2)
    expected, grads = gradients(model, clips, mask)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(clips, mask)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-6)
