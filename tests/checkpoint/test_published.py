import argparse

import pytest
import torch

from vmae import InputError, ModelConfig, build_pretrainer
from vmae.checkpoint.published import config_from_arch, load_into, load_weights
from vmae.model.embed import sine_cosine_positions


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch pwned",)


@pytest.fixture
def state(tiny):
    return build_pretrainer(tiny).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"module": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_wrappers_and_prefixes_are_stripped(tmp_path, state, wrap):
    content = wrap(state)
    if "model" in content:
        content["args"] = argparse.Namespace(lr=1e-3)  # as the released files carry
    torch.save(content, tmp_path / "w.pth")
    loaded = load_weights(tmp_path / "w.pth")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


def test_safetensors(tmp_path, state):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(state, tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors").keys() == state.keys()
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="bad.safetensors cannot be read"):
        load_weights(tmp_path / "bad.safetensors")


def test_a_malicious_file_is_refused_unexecuted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(1)}, "args": Evil()}, "evil.pth")
    with pytest.raises(
        InputError, match="evil.pth is damaged, or holds more than weights and was not executed"
    ):
        load_weights("evil.pth")
    assert not (tmp_path / "pwned").exists()


def test_damaged_missing_and_empty_files_are_named(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    for name in ("cut.pth", "gone.pth"):
        with pytest.raises(InputError, match=name):
            load_weights(tmp_path / name)
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(InputError, match="holds no weights"):
        load_weights(tmp_path / "empty.pth")


def test_loads_strictly_and_lists_what_differs(tiny, state):
    model = build_pretrainer(tiny)
    assert load_into(model, state, "w.pth") == f"w.pth: all {len(state)} tensors loaded"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
    other = build_pretrainer(tiny.replace(embed_dim=60, depth=3))
    before = other.mask_token.clone()
    with pytest.raises(InputError) as caught:
        load_into(other, {**state, "extra.key": torch.ones(1)}, "w.pth")
    text = str(caught.value)
    assert "w.pth is of another architecture" in text
    assert (
        "encoder.patch_embed.proj.weight: [48, 3, 2, 16, 16] in the file, [60, 3, 2, 16, 16] in the model"
        in text
    )
    assert "missing in the file (13): encoder.blocks.2" in text and "not in the model (1): extra.key" in text
    assert torch.equal(other.mask_token, before), "nothing half-loaded"


def test_encoder_only_files_start_a_fresh_decoder_and_say_so(tiny, state):
    encoder = {k: v for k, v in state.items() if k.startswith("encoder.")}
    model = build_pretrainer(tiny)
    assert "the file has no decoder" in load_into(model, encoder, "e.pth", allow_encoder_only=True)
    with pytest.raises(InputError, match="missing in the file"):
        load_into(model, encoder, "e.pth")
    del encoder["encoder.norm.bias"]
    with pytest.raises(InputError, match="encoder.norm.bias"):
        load_into(model, encoder, "e.pth", allow_encoder_only=True)


def test_fixed_position_tables_in_a_file_are_left_out(tiny, state):
    extra = {
        **state,
        "pos_embed": sine_cosine_positions(64, 32),
        "encoder.pos_embed": sine_cosine_positions(64, 48).bfloat16(),
    }
    load_into(build_pretrainer(tiny), extra, "w.pth")
    with pytest.raises(
        InputError, match="encoder.pos_embed of checkpoint w.pth was learned, but the model has fixed"
    ):
        load_into(build_pretrainer(tiny), {**extra, "encoder.pos_embed": torch.zeros(1, 64, 48)}, "w.pth")


def test_published_constructor_arguments():
    arch = dict(
        img_size=224,
        patch_size=14,
        encoder_in_chans=3,
        encoder_num_classes=0,
        encoder_embed_dim=1408,
        encoder_depth=40,
        encoder_num_heads=16,
        decoder_num_classes=1176,
        decoder_embed_dim=512,
        decoder_depth=4,
        decoder_num_heads=8,
        mlp_ratio=48 / 11,
        qkv_bias=True,
        tubelet_size=2,
        all_frames=16,
    )
    assert config_from_arch(arch) == ModelConfig.preset("vit_g")
    for change, words in (
        (dict(drop_rate=0.1), "drop_rate=0.1 is not supported"),
        (dict(decoder_num_classes=1536), "decoder_num_classes=1536 but a tubelet has 1176"),
        (dict(windows=3), "unknown argument windows=3"),
        (dict(encoder_in_chans=4), "encoder_in_chans=4"),
    ):
        with pytest.raises(InputError, match=words):
            config_from_arch({**arch, **change})
