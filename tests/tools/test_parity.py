import json

import numpy as np
import pytest
import torch

from vmae.checkpoint.published import config_from_arch
from vmae.cli import main
from vmae.masking import DualMask
from vmae.model import build_reference
from vmae.tools.parity import BOUNDS, check_file, fill_golden, golden_weight, passed

FILES = [
    "running_cell_8x14x14_50",
    "tiny_dual",
    "tiny_encoder_only",
    "tiny_rawpixels",
    "tiny_classify",
    "small_dual",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_golden_files_agree(golden, name, backend):
    errors = check_file(golden / f"{name}.npz", backend)
    assert errors and passed(errors), errors
    kinds = {"running_cell": {"masks"}, "tiny_dual": {"pred", "loss", "gradients", "trajectory"}}
    for start, expected in kinds.items():
        assert not name.startswith(start) or set(errors) == expected


def test_command_prints_each_file_and_ends_with_0(golden, capsys):
    assert main(["parity", *[str(golden / f"{name}.npz") for name in FILES[:3]]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "ok", "3"] and "trajectory" in lines[1]


def changed(source, target, **changes):
    with np.load(source) as stored:
        arrays = {key: stored[key] for key in stored.files}
    meta = json.loads(str(arrays["meta"])) | changes.pop("meta", {})
    np.savez(target, **{**arrays, "meta": json.dumps(meta), **changes})
    return str(target)


@pytest.mark.parametrize(
    "key, spoil",
    [
        ("loss", lambda x: x * 1.001),
        ("pred", lambda x: x + 1e-3),
        ("trajectory", lambda x: np.append(x[:-1], x[-1] * 1.001)),
        ("gradnorm/mask_token", lambda x: x * 1.01),
        ("grad/encoder.blocks.0.attn.v_bias", lambda x: x * 1.01),
    ],
)
def test_a_wrong_value_fails_whatever_its_kind(golden, tmp_path, capsys, key, spoil):
    with np.load(golden / "tiny_dual.npz") as stored:
        value = spoil(stored[key])
    path = changed(golden / "tiny_dual.npz", tmp_path / "named_as_it_likes.npz", **{key: value})
    assert main(["parity", path]) == 1
    assert capsys.readouterr().out.startswith("FAIL")


def test_not_a_number_fails():
    assert not passed({"loss": float("nan")}) and passed({"loss": BOUNDS["loss"]})


def test_what_meta_describes_is_built(golden, tmp_path):
    """Another target and another learning rate change the outcome: both are read from the file."""
    path = changed(golden / "tiny_dual.npz", tmp_path / "a.npz", meta={"normalize_target": False})
    assert check_file(path)["loss"] > 0.1
    with np.load(golden / "tiny_dual.npz") as stored:
        optimizer = json.loads(str(stored["meta"]))["optimizer"]
    path = changed(
        golden / "tiny_dual.npz", tmp_path / "b.npz", meta={"optimizer": {**optimizer, "lr": 2e-3}}
    )
    errors = check_file(path)
    assert errors["loss"] < 1e-6 and errors["trajectory"] > 1e-3


# Kinds of file that may come: each made here from the reference, whose agreement with the published code the
# real golden files show; so this checks that every field of `arch` is understood, on the fast path.
@pytest.mark.parametrize(
    "change",
    [
        dict(patch_size=14, img_size=56, decoder_num_classes=1176, mlp_ratio=48 / 11),
        dict(encoder_embed_dim=176, encoder_num_heads=2),
        dict(init_values=0.1),
        dict(cos_attn=True),
        dict(use_learnable_pos_emb=True),
        dict(qkv_bias=False, qk_scale=0.3),
    ],
)
def test_other_architectures(golden, tmp_path, change):
    with np.load(golden / "tiny_dual.npz") as stored:
        meta = json.loads(str(stored["meta"]))
    meta["arch"] |= change
    meta["optimizer"]["steps"] = 0
    config = config_from_arch(meta["arch"])
    model = fill_golden(build_reference(config))
    clip = (
        np.random.RandomState(3).randint(0, 256, (2, config.num_frames, *config.image_hw, 3)).astype(np.uint8)
    )
    mask = DualMask.sample(2, config.grid, encoder_ratio=0.75)
    loss = model(torch.from_numpy(clip), mask)
    loss.backward()
    frozen = "encoder.pos_embed"  # the published code detaches learned positions
    norms = {f"gradnorm/{n}": p.grad.norm().numpy() for n, p in model.named_parameters() if n != frozen}
    enc, dec = (m.numpy().astype(np.uint8) for m in mask.to_bool())
    meta["clip_seed"], stored_clip = 3, np.empty(0, np.uint8)
    outputs = dict(
        loss=loss.detach().numpy(), pred=model.predict(torch.from_numpy(clip), mask).detach().numpy()
    )
    np.savez(
        tmp_path / "g.npz",
        meta=json.dumps(meta),
        clip=stored_clip,
        enc_mask=enc,
        dec_mask=dec,
        **outputs,
        **norms,
    )
    errors = check_file(tmp_path / "g.npz")
    assert passed(errors) and set(errors) == {"pred", "loss", "gradients"}, errors


def test_golden_weights_follow_the_rule():
    import zlib

    expected = 0.02 * np.random.RandomState(zlib.crc32(b"a.gamma_1")).standard_normal((4,))
    np.testing.assert_allclose(golden_weight("a.gamma_1", (4,)).numpy(), expected + 0.1, rtol=1e-5)
    assert abs(float(golden_weight("norm.weight", (500,)).mean()) - 1) < 0.01
    assert abs(float(golden_weight("fc.weight", (50, 50)).mean())) < 0.01


def test_bad_files_are_named(golden, tmp_path, capsys):
    assert main(["parity", str(tmp_path / "none.npz")]) == 2
    assert "none.npz does not exist" in capsys.readouterr().err
    (tmp_path / "text.npz").write_text("hello")
    assert main(["parity", str(tmp_path / "text.npz")]) == 2
    assert "text.npz is not a golden file" in capsys.readouterr().err
    path = changed(golden / "tiny_dual.npz", tmp_path / "a.npz", meta={"kind": "detect"})
    assert main(["parity", path]) == 2
    path = changed(golden / "tiny_dual.npz", tmp_path / "b.npz", **{"gradnorm/nobody.weight": np.float64(1)})
    assert main(["parity", path]) == 2
    assert "b.npz: the file has a gradient of nobody.weight" in capsys.readouterr().err
