"""A classifier starts from whatever there is: every key loaded, named as dropped, or an error."""

import argparse

import pytest
import torch

from vmae import InputError, build_classifier, build_pretrainer
from vmae.checkpoint.start import start_classifier
from vmae.model.embed import interpolate_positions, sine_cosine_positions


def save(tmp_path, state, wrapper="model", **beside):
    """A file as the published ones are."""
    path = tmp_path / "official.pth"
    torch.save({wrapper: state, "args": argparse.Namespace(lr=1e-3), **beside}, path)
    return path


def classifier(config, classes=5, **options):
    torch.manual_seed(1)
    return build_classifier(config, classes, **options)


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_pretrained_encoder(tiny, tmp_path, wrapper):
    source = build_pretrainer(tiny)
    path = save(tmp_path, source.state_dict(), wrapper)
    model = classifier(tiny)
    report = start_classifier(model, path, grid=tiny.grid)
    for name, value in source.encoder.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(model.state_dict()[name], value), name
    assert report.fresh == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    names = [name for names in report.dropped.values() for name in names]
    assert len(names) + report.loaded == len(source.state_dict())  # every key accounted for
    assert "dropped (decoder)" in report.describe(
        path
    ) and "4 start fresh (fc_norm, head)" in report.describe(path)


def test_the_first_token_keeps_the_encoders_norm(tiny, tmp_path):
    source = build_pretrainer(tiny)
    torch.nn.init.normal_(source.encoder.norm.weight)
    model = classifier(tiny, pooling="first")
    assert start_classifier(model, save(tmp_path, source.state_dict()), grid=tiny.grid).fresh == [
        "head.weight",
        "head.bias",
    ]
    assert torch.equal(model.norm.weight, source.encoder.norm.weight)


def test_fine_tuned_model_of_the_same_classes(tiny, tmp_path, clips_of):
    source = build_classifier(tiny, 5)
    state = {f"_orig_mod.backbone.{name}": value for name, value in source.state_dict().items()}
    model = classifier(tiny)
    report = start_classifier(model, save(tmp_path, state, "module"), grid=tiny.grid)
    assert not report.fresh and not report.dropped
    assert torch.equal(model.eval()(clips_of(tiny)), source.eval()(clips_of(tiny)))


def test_a_head_of_more_classes_is_converted(tiny, tmp_path, clips_of):
    source, model = build_classifier(tiny, 9), classifier(tiny, 4)
    report = start_classifier(
        model, save(tmp_path, source.state_dict()), grid=tiny.grid, label_map=[8, 0, 3, 5]
    )
    assert report.notes == ["head of 9 classes converted to 4"]
    torch.testing.assert_close(model.eval()(clips_of(tiny)), source.eval()(clips_of(tiny))[:, [8, 0, 3, 5]])


def test_a_new_head(tiny, tmp_path):
    source, model = build_classifier(tiny, 9), classifier(tiny, 4)
    before = model.head.weight.clone()
    report = start_classifier(model, save(tmp_path, source.state_dict()), grid=tiny.grid, new_head=True)
    assert report.fresh == ["head.weight", "head.bias"] and torch.equal(model.head.weight, before)
    assert torch.equal(model.fc_norm.weight, source.fc_norm.weight)


def test_probes_and_features(tiny, tmp_path):
    path = save(tmp_path, build_classifier(tiny, 9).state_dict())
    probe = start_classifier(classifier(tiny, 4, pooling="attentive"), path, grid=tiny.grid, new_head=True)
    assert {name.split(".")[0] for name in probe.fresh} == {"pool", "head"}
    features = start_classifier(classifier(tiny, 0), path, grid=tiny.grid)
    assert not features.fresh and features.dropped == {"head": ["head.weight", "head.bias"]}


def test_positions(tiny, tmp_path):
    wide = dict(img_size=(96, 64), num_frames=12)
    learned = build_pretrainer(tiny.replace(learned_pos=True))
    path = save(tmp_path, learned.state_dict())
    model = classifier(tiny.replace(learned_pos=True, **wide))
    report = start_classifier(model, path, grid=tiny.grid)
    assert report.notes == ["positions interpolated from (4, 4, 4) to (6, 6, 4) tokens"]
    assert torch.equal(
        model.pos_embed, interpolate_positions(learned.encoder.pos_embed, tiny.grid, (6, 6, 4))
    )
    fixed = {**build_classifier(tiny, 5).state_dict(), "pos_embed": sine_cosine_positions(64, 48).half()}
    with pytest.raises(InputError, match="64 positions, which is no 8 x 4 x 4 grid"):
        start_classifier(model, path, grid=(8, 4, 4))
    report = start_classifier(classifier(tiny), save(tmp_path, fixed), grid=tiny.grid)
    assert report.dropped == {"fixed positions": ["pos_embed"]}
    fixed["pos_embed"] = torch.randn(1, 64, 48)
    with pytest.raises(
        InputError, match="pos_embed of checkpoint .* was learned, but the model has fixed positions"
    ):
        start_classifier(classifier(tiny), save(tmp_path, fixed), grid=tiny.grid)


def test_what_does_not_fit_is_an_error(tiny, tmp_path):
    nine = build_classifier(tiny, 9).state_dict()
    with pytest.raises(InputError, match="head of 9 classes, the labels have 5: --label-map"):
        start_classifier(classifier(tiny), save(tmp_path, nine), grid=tiny.grid)
    with pytest.raises(InputError, match="label map has 2 classes"):
        start_classifier(classifier(tiny), save(tmp_path, nine), grid=tiny.grid, label_map=[0, 1])
    with pytest.raises(InputError, match="has no head to convert"):
        start_classifier(
            classifier(tiny),
            save(tmp_path, build_pretrainer(tiny).state_dict()),
            grid=tiny.grid,
            label_map=[0],
        )
    five = build_classifier(tiny, 5).state_dict()
    with pytest.raises(InputError, match="not in the model \\(1\\): surprise"):
        start_classifier(
            classifier(tiny), save(tmp_path, {**five, "surprise": torch.ones(1)}), grid=tiny.grid
        )
    lacking = {name: value for name, value in five.items() if name != "fc_norm.bias"}
    with pytest.raises(InputError, match="missing in the file \\(1\\): fc_norm.bias"):
        start_classifier(classifier(tiny), save(tmp_path, lacking), grid=tiny.grid)
    with pytest.raises(InputError, match="shapes differ"):
        start_classifier(classifier(tiny.replace(embed_dim=96)), save(tmp_path, five), grid=tiny.grid)
