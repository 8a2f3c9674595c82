"""What every target of the registry gives: values of the counted tokens, and the gradient of their error."""

import math

import pytest
import torch
import torch.nn.functional as F

from vmae import DualMask, ModelConfig, build_pretrainer
from vmae.checkpoint.folder import export_weights
from vmae.cli import main
from vmae.model.target import Target
from vmae.targets import TARGETS
from vmae.targets.building import build_target
from vmae.targets.settings import TargetConfig, Wanted


@pytest.fixture(params=TARGETS)
def target(request, tiny, tmp_path) -> Target:
    """Each target, of a tiny model; one that needs a teacher gets one of another width."""
    options = {}
    if request.param == "teacher":
        teacher = tiny.replace(embed_dim=24, num_heads=2)
        export_weights(
            tmp_path / "teacher.pth",
            build_pretrainer(teacher).state_dict(),
            config={"model": teacher.to_dict()},
        )
        options = {"teacher": str(tmp_path / "teacher.pth")}
    return build_target(Wanted(tiny, TargetConfig(name=request.param, **options)))


def draw(config: ModelConfig) -> DualMask:
    """Random masks on both sides: tokens that the encoder sees reach the head, with weight 0."""
    random = dict(encoder="random", encoder_ratio=0.5, decoder="random", decoder_ratio=0.5)
    return DualMask.sample(2, config.grid, **random, generator=torch.Generator().manual_seed(2))


def test_the_first_is_the_published_one_and_help_lists_all(capsys):
    assert next(iter(TARGETS)) == "pixels"
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert all("".join(f"{name} ({about})".split()) in shown for name, about in TARGETS.items())


def test_values_are_of_the_counted_tokens(target, tiny, clips_of):
    mask = draw(tiny)
    values = target.values(clips_of(tiny), mask)
    assert values.shape == (2, mask.keep.shape[1], target.width) and values.isfinite().all()
    assert not values.requires_grad and values.flatten(1).std(1).min() > 0
    assert values.unique(dim=1).shape == values.shape, "each token has its own"
    assert target.name in TARGETS and target.describe()
    assert target.macs() >= 0 and target.state_bytes() >= 0
    target.to(torch.device("cpu"))


def test_a_loss_and_its_gradient_are_those_of_the_values(target, tiny, clips_of):
    """Through the model: the loss, and the head's gradient, against the formula by autograd and by a step."""
    model = build_pretrainer(tiny, target=target)
    clips, mask = clips_of(tiny), draw(tiny)
    loss = model(clips, mask)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    values, weight = target.values(clips, mask).float(), mask.target_weight

    def formula() -> torch.Tensor:
        predicted = model.predict(clips, mask).gather(1, mask.keep.long()[..., None].expand_as(values))
        return (target.compare(predicted, values) * weight).sum() / weight.sum()

    head, found = model.decoder.head.weight, model.decoder.head.weight.grad.clone()
    expected = formula()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(expected, head)
    torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6)
    direction, losses = F.normalize(found, dim=(0, 1)), []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            head.add_(direction, alpha=step)
            losses.append(formula().item())
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(found.norm().item(), rel=2e-2)


def test_trivial_predictors_have_losses(target, tiny, clips_of):
    losses = target.trivial(clips_of(tiny), draw(tiny))
    assert list(losses)[0] == "zero" and len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
