"""The seam between the pre-trainer and what it predicts: pixels go through it as before, any other target in
the same form."""

import pytest
import torch
import torch.nn.functional as F

from vmae import DualMask, MaskConfig, ModelConfig
from vmae.model import Pretrainer
from vmae.model.cost import count_saved_bytes, count_step, on_paper
from vmae.model.rows import Rows
from vmae.model.target import Pixels, Target
from vmae_kernels import head_patch_loss, patch_targets_ref

CONFIG = ModelConfig(
    img_size=32,
    patch_size=8,
    num_frames=8,
    embed_dim=48,
    depth=2,
    num_heads=3,
    decoder_embed_dim=32,
    decoder_depth=2,
    decoder_num_heads=2,
)
MASKS = [
    MaskConfig(encoder_ratio=0.75),
    MaskConfig(encoder="random", encoder_ratio=0.75, decoder="random", decoder_ratio=0.5),  # unequal counts
    MaskConfig(encoder_ratio=0.75, decoder="none"),
]


class WithoutSeam(Pretrainer):
    """The pre-trainer of before targets: the fused loss, called where the decoder ends."""

    def forward(self, clips, mask, values=None):
        counted = Rows(mask.hidden_rows, mask.hidden_uses, self.backend)
        rows = self.decode(self.encode(clips, mask), mask, counted)
        head = self.decoder.head
        return head_patch_loss(
            self.final_norm(rows),
            head.weight,
            head.bias,
            clips,
            mask.target,
            mask.target_weight,
            self.normalize_target,
            tubelet_size=self.config.tubelet_size,
            backend=self.backend,
        )


class Means(Target):
    """A token's mean colour, as a target of 3 values; counts how often it was asked."""

    name = "means"
    asked = 0

    @property
    def width(self):
        return 3

    def values(self, clips, mask):
        self.asked += 1
        assert not torch.is_grad_enabled()
        pixels = Pixels(self.config, normalize=False).values(clips, mask)
        return pixels.unflatten(-1, (-1, 3)).mean(2)


def draw(mask, batch=3, seed=0, config=CONFIG):
    generator = torch.Generator().manual_seed(seed)
    size = (batch, config.num_frames, *config.image_hw, 3)
    clips = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return clips, DualMask.sample(batch, config.grid, **mask.to_dict(), generator=generator)


def build(kind=Pretrainer, **options):
    torch.manual_seed(0)
    return kind(CONFIG, backend="torch", **options)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.encoder}-{mask.decoder}")
@pytest.mark.parametrize("normalize", [True, False])
def test_pixels_lose_not_a_bit_and_keep_not_a_byte(mask, normalize):
    clips, drawn = draw(mask)
    models = [build(kind, normalize_target=normalize) for kind in (WithoutSeam, Pretrainer)]
    losses = [model(clips, drawn) for model in models]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, before), now in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(before, now) and torch.equal(before.grad, now.grad), name
    one, two = (count_saved_bytes(lambda model=model: model(clips, drawn), model) for model in models)
    assert one == two
    one, two = (count_step(lambda model=model: model(clips, drawn), model) for model in models)
    assert one == two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_is_with_the_fused_kernels_on_paper(dtype):
    """At the widths of ViT-B, and with what Triton's operators keep."""
    config = ModelConfig.preset("vit_b", depth=1, decoder_depth=1)

    def count(kind):
        with on_paper(lambda c: kind(c, backend="triton"), config, MaskConfig(), dtype) as (model, loss_of):
            return count_step(lambda: loss_of(2), model)

    count(Pretrainer)  # the first of a process makes tensors that stay, such as a generator's
    assert count(WithoutSeam) == count(Pretrainer)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.encoder}-{mask.decoder}")
def test_another_target_is_compared_at_counted_tokens(mask):
    """The mean over tokens of their errors; rows that fill up a clip with fewer tokens count nothing."""
    clips, drawn = draw(mask)
    target = Means(CONFIG)
    model = build(target=target)
    assert model.decoder.head.weight.shape == (3, 32) and not model.normalize_target
    loss = model(clips, drawn)
    loss.backward()
    assert target.asked == 1 and model.decoder.head.weight.grad.abs().max() > 0
    assert not any("target" in name for name in model.state_dict())
    with torch.no_grad():
        predicted = model.predict(clips, drawn)
        everything = torch.arange(CONFIG.num_tokens, dtype=torch.int32).expand(3, -1)
        size = (CONFIG.patch_size, CONFIG.tubelet_size)
        means = patch_targets_ref(clips, everything, *size, False).unflatten(-1, (-1, 3)).mean(2)
        chosen = means.gather(1, drawn.decode.long()[..., None].expand(-1, -1, 3))
        errors = F.mse_loss(predicted, chosen, reduction="none").mean(-1)[drawn.weight.bool()]
    torch.testing.assert_close(loss.detach(), errors.mean(), rtol=1e-5, atol=1e-6)


def test_values_that_are_known_are_not_made_again():
    clips, drawn = draw(MASKS[1])
    target = Means(CONFIG)
    model = build(target=target)
    with torch.no_grad():
        values = target.values(clips, drawn)
    assert torch.equal(model(clips, drawn, values=values), model(clips, drawn)) and target.asked == 2
    assert model(clips, drawn, values=values + 1) != model(clips, drawn)


def test_packed_groups_weigh_as_one_mean():
    """Groups of other counts, masks and sizes: the mean over all counted tokens, and its gradients."""
    small = CONFIG.replace(num_frames=4)
    groups = [draw(MASKS[0], 2), draw(MASKS[1], 1, seed=1), draw(MASKS[2], 1, seed=2, config=small)]
    model = build(target=Means(CONFIG))
    packed = model([clips for clips, _ in groups], [mask for _, mask in groups])
    grads = torch.autograd.grad(packed, list(model.parameters()))
    alone = []
    for clips, mask in groups:
        loss = model([clips], [mask])
        alone.append((loss, mask.target_weight.sum()))
    mean = sum(loss * weight for loss, weight in alone) / sum(weight for _, weight in alone)
    torch.testing.assert_close(packed, mean)
    for one, two in zip(grads, torch.autograd.grad(mean, list(model.parameters()))):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    # A group of the model's own size is what an even batch of it is.
    for clips, mask in groups[:2]:
        torch.testing.assert_close(model([clips], [mask]), model(clips, mask), rtol=1e-5, atol=1e-6)


def test_autocast_compares_in_float32():
    clips, drawn = draw(MASKS[1])
    model = build(target=Means(CONFIG))
    plain = model(clips, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clips, drawn)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), rel=0.02)
    assert loss != plain
