"""Files and folders that people bring from other trainers: written as those write them, read by every
command, with what was done to them said."""

import argparse
import collections
import pathlib
import pickle
import types

import numpy as np
import pytest
import torch

from vmae import InputError, ModelConfig, build_classifier, build_pretrainer
from vmae.checkpoint import find_weights, load_classifier, read_checkpoint, to_model
from vmae.checkpoint.published import read_weights
from vmae.cli import main
from vmae.model.embed import sine_cosine_positions

TINY = ModelConfig.preset("vit_tiny", img_size=32, num_frames=4)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(3)
    model = build_classifier(TINY, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def pretrainer():
    torch.manual_seed(4)
    return build_pretrainer(TINY).eval()


class OldNumpyPickler(pickle._Pickler):
    """Writes numpy's scalars under the name that numpy 1 has for their function."""

    def save_global(self, obj, name=None):
        if obj is np.float64(0).__reduce__()[0]:
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\nscalar\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


class NewNumpyPickler(pickle._Pickler):
    """The same with the name of numpy 2."""

    def save_global(self, obj, name=None):
        if obj is np.float64(0).__reduce__()[0]:
            self.write(pickle.GLOBAL + b"numpy._core.multiarray\nscalar\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def trained(model, **arguments):
    """What the published trainer keeps of a step: its optimizer with numpy's learning rates, scaler and
    arguments."""
    named = list(model.named_parameters())
    groups = [{"params": [value], "lr_scale": np.float64(0.75), "name": name} for name, value in named]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for group in optimizer.param_groups:
        group["lr"] = np.float64(1e-3) * group["lr_scale"]
    for _, value in named[:2]:
        value.grad = torch.zeros_like(value)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0).state_dict()
    usual = {
        "num_frames": 4,
        "input_size": np.int64(32),
        "num_segments": 1,
        "lr": np.float64(1e-3),
        "clip_grad": np.float32(0.5),
        "count": np.uint8(7),
        "flag": np.bool_(True),
        "name": np.str_("run"),
        "output_dir": pathlib.Path("runs/one"),
        "device": torch.device("cuda:0"),
        "dtype": torch.float16,
        "shape": torch.Size([1, 2]),
        "nested": argparse.Namespace(kind=np.dtypes.Float64DType, dtype=np.dtype("float32")),
    }
    args = argparse.Namespace(**(usual | arguments))
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": scaler,
        "args": args,
    }


def same(found, model):
    own = model.state_dict()
    return found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)


# --- The published trainer ---


@pytest.mark.parametrize("pickler", [OldNumpyPickler, NewNumpyPickler, pickle.Pickler])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_published_trainer(tmp_path, classifier, pickler, zipped):
    content = trained(classifier)
    content["model"] = {f"_orig_mod.{name}": value for name, value in content["model"].items()}
    module = types.SimpleNamespace(Pickler=pickler, dump=None, __name__="pickles", dumps=None)
    if not zipped:
        module.dump = lambda obj, file, protocol: pickler(file, protocol).dump(obj)
    torch.save(content, tmp_path / "w.pth", pickle_module=module, _use_new_zipfile_serialization=zipped)
    raw = (tmp_path / "w.pth").read_bytes()
    if pickler is OldNumpyPickler:
        assert b"numpy.core.multiarray\nscalar" in raw and b"numpy._core" not in raw
    source = read_checkpoint(tmp_path / "w.pth")
    assert same(source.state, classifier)
    assert source.settings == {"published": {"num_frames": 4, "img_size": 32}}
    assert "prefix _orig_mod. removed from 58 names" in source.changes
    assert any("not read, beside it: optimizer, epoch, scaler, args" in line for line in source.changes)
    assert "taken as vit_tiny by its shapes" in source.note and source.config == TINY


def test_what_arguments_hold_becomes_plain(tmp_path, classifier):
    """No object of numpy comes out of a file."""
    from vmae.checkpoint.pickles import read_pickle

    torch.save(trained(classifier, big=np.float64(-1.5e300), z=np.complex64(1 + 2j)), tmp_path / "w.pth")
    args = read_pickle(tmp_path / "w.pth", "zip")["args"]
    assert (args.lr, args.count, args.flag, args.name) == (1e-3, 7, True, "run")
    assert [type(value) for value in (args.lr, args.count, args.flag, args.name)] == [float, int, bool, str]
    assert (args.big, args.z, args.clip_grad) == (-1.5e300, 1 + 2j, 0.5)
    assert str(args.output_dir) == "runs/one" and args.dtype == torch.float16 and args.shape == (1, 2)
    big_endian = np.dtype(">f8").type(2.5).astype(">f8")
    torch.save({"w": torch.ones(2), "lr": big_endian}, tmp_path / "b.pth")
    assert read_pickle(tmp_path / "b.pth", "zip")["lr"] == 2.5


def test_averaged_weights_of_the_published_trainer(tmp_path, classifier):
    averaged = {f"module.{name}": value / 2 for name, value in classifier.state_dict().items()}
    torch.save({**trained(classifier), "model_ema": averaged}, tmp_path / "w.pth")
    live = load_classifier(tmp_path / "w.pth")
    assert "averaged weights lie under model_ema; --averaged takes them" in live.note
    assert same(live.model.state_dict(), classifier)
    other = load_classifier(tmp_path / "w.pth", averaged=True)
    assert torch.equal(other.model.head.weight, classifier.head.weight / 2)
    assert "weights taken from model_ema" in other.note
    torch.save(trained(classifier), tmp_path / "none.pth")
    with pytest.raises(InputError, match="none.pth has no averaged weights .*leave --averaged out"):
        load_classifier(tmp_path / "none.pth", averaged=True)


@pytest.mark.parametrize(
    "arguments, clip",
    [
        ({"sampling_rate": 2}, ("dense", 2)),
        ({"sampling_rate": np.int64(3), "sparse_sample": True}, ("sparse", 3)),
        ({"sampling_rate": 4, "data_set": "SSV2"}, ("sparse", 4)),
        ({"sampling_rate": "4"}, None),
        ({"sampling_rate": -1}, None),
    ],
)
def test_arguments_of_fine_tuning_tell_how_videos_were_seen(tmp_path, classifier, arguments, clip):
    torch.save(trained(classifier, nb_classes=3, **arguments), tmp_path / "w.pth")
    loaded = load_classifier(tmp_path / "w.pth")
    assert (loaded.clip.sampling, loaded.clip.stride) == (clip or ("dense", 4))
    assert ("does not say how videos were seen" in loaded.note) == (clip is None)
    assert "told by the arguments of its training: num_frames 4, img_size 32" in loaded.note


@pytest.mark.parametrize(
    "arguments, mask",
    [
        (
            dict(mask_type="tube", mask_ratio=0.8, decoder_mask_type="run_cell", decoder_mask_ratio=0.25),
            dict(encoder="tube", encoder_ratio=0.8, decoder="running_cell", decoder_ratio=0.25),
        ),
        (
            dict(mask_type="tube", mask_ratio=0.75),
            dict(encoder="tube", encoder_ratio=0.75, decoder_ratio=0.0),
        ),
        (dict(mask_type="tube", mask_ratio="much"), None),
        (dict(mask_type="other", mask_ratio=0.75), None),
    ],
)
def test_arguments_of_pre_training_tell_mask_and_target(tmp_path, pretrainer, arguments, mask):
    torch.save(trained(pretrainer, sampling_rate=2, normlize_target=False, **arguments), tmp_path / "w.pth")
    source = read_checkpoint(tmp_path / "w.pth")
    assert source.settings["stride"] == 2 and (mask or {}).items() <= source.settings.get("mask", {}).items()
    assert ("mask" in source.settings) == (mask is not None)
    assert not to_model(source, "pretrainer")[0].normalize_target


# --- Names ---


@pytest.mark.parametrize(
    "prefixed",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"model.module.backbone._orig_mod.{name}",
        lambda name: f"backbone.model.{name}",
        lambda name: name.replace("encoder.", "encoder._orig_mod."),
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
        lambda name: "_fsdp_wrapped_module." + name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."),
    ],
)
def test_prefixes_go_wherever_they_are(tmp_path, pretrainer, prefixed):
    state = {prefixed(name): value for name, value in pretrainer.state_dict().items()}
    for wrapped in (state, {"model": state}, {"state_dict": {"module": state}, "epoch": 1}):
        torch.save(wrapped, tmp_path / "w.pth")
        source = read_checkpoint(tmp_path / "w.pth")
        assert same(source.state, pretrainer)
        assert any(line.startswith("prefix ") for line in source.changes)


def test_names_that_become_one(tmp_path, classifier):
    state = classifier.state_dict()
    twice = {**state, "module.head.bias": state["head.bias"].clone()}
    torch.save(twice, tmp_path / "same.pth")
    source = read_checkpoint(tmp_path / "same.pth")
    assert same(source.state, classifier) and any("there twice" in line for line in source.changes)
    torch.save({**twice, "module.head.bias": state["head.bias"] + 1}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match="w.pth holds head.bias and module.head.bias, which are both head.bia"
    ):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("key", ["state_dict", "model_state", "model_state_dict", "module", "net"])
def test_wrappers(tmp_path, classifier, key):
    torch.save({key: {"model": classifier.state_dict()}, "epoch": 3}, tmp_path / "w.pth")
    source = read_checkpoint(tmp_path / "w.pth")
    assert same(source.state, classifier)
    assert f"weights taken from {key} / model (not read, beside it: epoch)" in source.changes


def test_wrappers_that_do_not_say_which_model(tmp_path, classifier):
    state = classifier.state_dict()
    torch.save({"teacher": state, "student": state, "epoch": 1}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"its keys are: teacher, student, epoch; which of them is the model"
    ):
        read_checkpoint(tmp_path / "w.pth")
    both = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in state.items()}
    torch.save({"state_dict": both}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"two models, student\.\* and teacher\.\*"):
        read_checkpoint(tmp_path / "w.pth")
    round_about = {"weight": torch.ones(2)}
    round_about["model"] = round_about
    torch.save(round_about, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").state.keys() == {"weight"}  # and it ends
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(InputError, match="w.pth holds no weights: it is a list"):
        read_checkpoint(tmp_path / "w.pth")


def test_files_of_mmaction2(tmp_path, classifier):
    """Names as in its vit_mae.py, fixed positions in a buffer, and `meta` beside `state_dict`."""
    parts = {
        "patch_embed.proj.": "patch_embed.projection.",
        ".mlp.fc1.": ".mlp.layers.0.0.",
        ".mlp.fc2.": ".mlp.layers.1.",
        "backbone.head.": "cls_head.fc_cls.",
    }
    state = {"backbone.pos_embed": sine_cosine_positions(8, 128)}
    for name, value in classifier.state_dict().items():
        name = f"backbone.{name}"
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        state[name] = value
    assert "cls_head.fc_cls.weight" in state and "backbone.blocks.0.mlp.layers.0.0.bias" in state
    torch.save({"meta": {"epoch": 3, "cfg": "x = 1"}, "state_dict": state}, tmp_path / "w.pth")
    loaded = load_classifier(tmp_path / "w.pth", source=(4, 32))
    assert same(loaded.model.state_dict(), classifier)
    assert "1 dropped (fixed positions)" in loaded.note and "20 names of mmaction2 replaced" in loaded.note


# --- DeepSpeed, and folders ---


def states(folder, model, name="mp_rank_00_model_states.pt"):
    """As DeepSpeed writes them: half-precision weights under `module`, shapes and settings beside."""
    folder.mkdir(parents=True, exist_ok=True)
    module = collections.OrderedDict((key, value.half()) for key, value in model.state_dict().items())
    shapes = [collections.OrderedDict((key, value.shape) for key, value in module.items())]
    about = {"buffer_names": [], "param_shapes": shapes, "sparse_tensor_module_names": set(), "epoch": 3}
    torch.save({"module": module, **about, "optimizer": None, "ds_version": "0.14"}, folder / name)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never read")
    return folder / name


def test_folders_of_deepspeed(tmp_path, classifier, pretrainer):
    best = states(tmp_path / "checkpoint-best", classifier)
    states(tmp_path / "checkpoint-9", pretrainer)
    newest = states(tmp_path / "checkpoint-12", pretrainer)
    for given in (tmp_path, tmp_path / "checkpoint-best", best):
        loaded = load_classifier(given, source=(4, 32))
        assert loaded.path == best and loaded.model.head.weight.dtype == torch.float32
        assert torch.equal(loaded.model.head.weight, classifier.head.weight.half().float())
        assert "58 tensors of float16; models here hold float32" in loaded.note
    assert (
        "checkpoint-best is taken of this folder, the best of 3"
        in load_classifier(tmp_path, source=(4, 32)).note
    )
    (tmp_path / "latest").write_text("checkpoint-12")
    source = read_checkpoint(tmp_path)
    assert source.path == newest and find_weights(tmp_path) == newest
    assert (
        "checkpoint-12 is taken of this folder, the tag in latest; checkpoint-best is there" in source.changed
    )
    (tmp_path / "latest").write_text("checkpoint-13\n")
    with pytest.raises(InputError, match="latest names 'checkpoint-13', which holds no mp_rank.*there are"):
        read_checkpoint(tmp_path)
    (tmp_path / "latest").unlink()
    best.unlink()
    (tmp_path / "checkpoint-best" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    assert find_weights(tmp_path) == newest


def test_deepspeed_in_parts(tmp_path, classifier):
    """ZeRO-3 and model parallel runs: one line, with what to do."""
    part = states(tmp_path / "a" / "step", classifier, "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for given in (tmp_path / "a", part.parent, part):
        with pytest.raises(InputError, match=r"ZeRO-3.*zero_to_fp32.py .* pytorch_model.bin") as caught:
            read_checkpoint(given)
        assert "\n" not in str(caught.value)
    states(tmp_path / "b", classifier)
    states(tmp_path / "b", classifier, "mp_rank_01_model_states.pt")
    with pytest.raises(InputError, match="2 parts of a model-parallel run"):
        read_checkpoint(tmp_path / "b")
    empty = {
        name: torch.empty(0) if value.ndim > 1 else value for name, value in classifier.state_dict().items()
    }
    torch.save({"module": empty}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="ZeRO-3"):
        read_checkpoint(tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="optimizer's state, no weights: give mp_rank_00"):
        read_checkpoint(tmp_path / "b" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "made").mkdir()
    torch.save(classifier.state_dict(), tmp_path / "made" / "pytorch_model.bin")
    assert read_checkpoint(tmp_path / "made").path.name == "pytorch_model.bin"


def test_folders_of_the_published_trainer(tmp_path, pretrainer):
    for name in ("checkpoint-9.pth", "checkpoint-19.pth", "log.txt"):
        torch.save({"model": pretrainer.state_dict()}, tmp_path / name)
    source = read_checkpoint(tmp_path)
    assert source.path.name == "checkpoint-19.pth"
    assert "checkpoint-19.pth is taken of this folder, the newest of 2" in source.changes
    torch.save({"model": pretrainer.state_dict()}, tmp_path / "checkpoint-best.pth")
    assert find_weights(tmp_path).name == "checkpoint-best.pth"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no complete checkpoint and no weights.pth"):
        read_checkpoint(tmp_path / "empty")


# --- What shapes tell ---


@pytest.mark.parametrize(
    "changes",
    [
        {"init_values": 0.1},
        {"qkv_bias": False},
        {"cos_attn": True},
        {"init_values": 1e-5, "qkv_bias": False, "cos_attn": True, "learned_pos": True, "patch_size": 8},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_shapes_tell_needs_no_flag(tmp_path, clips_of, changes, dtype):
    config = TINY.replace(**changes)
    torch.manual_seed(5)
    original = build_classifier(config, 3).eval()
    state = {name: value.to(dtype) for name, value in original.state_dict().items()}
    original.load_state_dict(state)
    torch.save({"module": state}, tmp_path / "w.pth")
    loaded = load_classifier(tmp_path / "w.pth", source=(4, 32))
    assert torch.equal(loaded.model(clips_of(config)), original(clips_of(config)))
    assert {value.dtype for value in loaded.model.state_dict().values()} == {torch.float32}
    assert (loaded.model.config.init_values > 0) == ("init_values" in changes)


@pytest.mark.parametrize("preset", ["vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_tiny", "vit_demo"])
def test_every_preset_is_known_by_its_shapes(preset):
    from vmae.checkpoint.shapes import preset_of, shapes_of, shown_by

    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        for model in (build_pretrainer(config), build_classifier(config, 2)):
            shown = shown_by(shapes_of(model.state_dict()))
            assert preset_of(shown) == preset
            assert {name: getattr(config, name) for name in shown} == shown


def test_a_preset_that_contradicts_the_file(tmp_path, classifier, pretrainer):
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    for preset in ("vit_s", "vit_small_patch16_224"):
        with pytest.raises(
            InputError, match="a width of 128 instead of 384, 4 blocks.*take --model vit_tiny"
        ):
            read_checkpoint(tmp_path / "w.pth", preset=preset)
    odd = build_classifier(TINY.replace(depth=3), 3)
    torch.save(odd.state_dict(), tmp_path / "odd.pth")
    with pytest.raises(InputError, match="3 blocks instead of 4; no preset has such shapes"):
        read_checkpoint(tmp_path / "odd.pth", preset="vit_tiny")
    with pytest.raises(InputError, match=r"does not say which architecture.*3 blocks.*no preset's"):
        load_classifier(tmp_path / "odd.pth")
    wide = build_pretrainer(TINY.replace(decoder_embed_dim=96, decoder_depth=1))
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    model, _ = to_model(read_checkpoint(tmp_path / "wide.pth", frames=4, size=32), "pretrainer")
    assert model.config.decoder_embed_dim == 96 and same(model.state_dict(), wide)
    with pytest.raises(InputError, match="a decoder of 1 blocks instead of 2"):
        read_checkpoint(tmp_path / "wide.pth", preset="vit_tiny", decoder_depth=2)


def test_files_of_other_models(tmp_path, classifier):
    state = classifier.state_dict()
    torch.save({**state, "cls_token": torch.zeros(1, 1, 128)}, tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"w.pth has a class token \(cls_token\), which models of VideoMAE do"
    ):
        load_classifier(tmp_path / "w.pth")
    whole = {name: value.mul(50).to(torch.int8) for name, value in state.items()}
    torch.save(whole, tmp_path / "w.pth")
    with pytest.raises(InputError, match="is of torch.int8: quantised weights are not read"):
        load_classifier(tmp_path / "w.pth")


# --- Commands ---


def words_of(folder, world, *, list_flag="--data"):
    flags = "--num-frames 4 --image-size 32 --stride 1 --batch-size 4 --steps 1 --device cpu --workers 0"
    return [list_flag, str(world / "train.txt"), "--output", str(folder), *flags.split(), "--no-tensorboard"]


def test_finetuning_starts_from_a_folder_of_deepspeed(tmp_path, labelled_world, capsys):
    """With layer scale, which no flag names."""
    scaled = build_classifier(TINY.replace(init_values=0.1), 3)
    states(tmp_path / "ds" / "checkpoint-best", scaled)
    (tmp_path / "ds" / "latest").write_text("checkpoint-best")
    words = words_of(tmp_path / "run", labelled_world)
    assert main(["finetune", *words, "--init", str(tmp_path / "ds"), "--lr", "1e-9"]) == 0
    said = capsys.readouterr().out
    assert "66 tensors loaded" in said and "taken as vit_tiny by its shapes" in said
    found = read_weights(tmp_path / "run" / "weights.pth")
    assert torch.allclose(found[1]["blocks.0.gamma_1"], scaled.blocks[0].gamma_1.half().float(), atol=1e-6)


def test_finetuning_keeps_the_pooling_of_use_cls(tmp_path, labelled_world, capsys):
    first = build_classifier(TINY, 3, pooling="first")
    torch.save({"module": first.state_dict()}, tmp_path / "first.pth")
    words = words_of(tmp_path / "run", labelled_world)
    assert main(["finetune", *words, "--init", str(tmp_path / "first.pth")]) == 0
    settings, state, _ = read_weights(tmp_path / "run" / "weights.pth")
    assert settings["pooling"] == "first" and "fc_norm.weight" not in state
    capsys.readouterr()
    for pooling, file, words_said in (
        ("mean", "first.pth", "fine-tuned on the first token (--use_cls"),
        ("first", "mean.pth", "fine-tuned on the mean over tokens"),
    ):
        torch.save(build_classifier(TINY, 3).state_dict(), tmp_path / "mean.pth")
        words = words_of(tmp_path / "run3", labelled_world)
        assert main(["finetune", *words, "--init", str(tmp_path / file), "--pooling", pooling]) == 2
        assert words_said in capsys.readouterr().err


def bare_encoder(model):
    return {
        name.removeprefix("encoder."): value
        for name, value in model.state_dict().items()
        if not name.startswith(("head.", "decoder.", "encoder_to_decoder.", "mask_token"))
    }


def test_an_encoder_alone_gets_a_fresh_head(classifier, pretrainer):
    from vmae.checkpoint.start import start_classifier

    state = bare_encoder(classifier)
    report = start_classifier(build_classifier(TINY, 5), "w.pth", grid=TINY.grid, state=state)
    assert report.loaded == 56 and report.fresh == ["head.weight", "head.bias"] and not report.dropped
    state = bare_encoder(pretrainer)
    report = start_classifier(build_classifier(TINY, 5), "w.pth", grid=TINY.grid, state=state)
    assert report.dropped == {
        "the encoder's final norm, for which fc_norm stands": ["norm.weight", "norm.bias"]
    }
    assert {name.split(".")[0] for name in report.fresh} == {"fc_norm", "head"} and report.loaded == 54


def test_pre_training_says_which_flags_fit(tmp_path, labelled_world, classifier, capsys):
    scaled = build_pretrainer(TINY.replace(init_values=0.1, decoder_depth=1, qkv_bias=False))
    torch.save(trained(scaled), tmp_path / "checkpoint-1.pth")
    (tmp_path / "list.txt").write_text("".join(f"{labelled_world}/v0{n} 1 10\n" for n in range(8)))
    words = words_of(tmp_path / "pre", labelled_world)
    words[1] = str(tmp_path / "list.txt")
    words += ["--encoder-ratio", "0.5", "--model", "vit_demo"]
    assert main(["pretrain", *words, "--init", str(tmp_path)]) == 2
    flags = "--model vit_tiny --decoder-depth 1 --layer-scale 1e-05 --no-qkv-bias"
    assert f"those of vit_tiny; flags that fit it: {flags}" in capsys.readouterr().err
    torch.save(classifier.state_dict(), tmp_path / "c.pth")
    assert main(["pretrain", *words, "--init", str(tmp_path / "c.pth")]) == 2
    assert "c.pth is of a classifier; pre-training goes on from pre-trained" in capsys.readouterr().err
    assert main(["pretrain", *words, *flags.split(), "--init", str(tmp_path)]) == 0


def test_convert_says_what_was_done(tmp_path, classifier, capsys):
    torch.save(trained(classifier), tmp_path / "w.pth")
    assert main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "folder")]) == 0
    said = capsys.readouterr().out
    assert "taken as vit_tiny by its shapes" in said and "not read, beside it: optimizer" in said
    assert same(read_checkpoint(tmp_path / "folder").state, classifier)


@pytest.mark.slow
def test_every_command_takes_them(tmp_path, labelled_world, classifier, pretrainer, capsys):
    """A file of the published trainer and a folder of DeepSpeed, without --model."""
    from vmae.model.detector import build_detector
    from vmae.synthetic.moving_actors import ACTIONS, ActorsConfig, write_actors

    actors = write_actors(tmp_path / "a", ActorsConfig(train=2, validation=1, scenes=2), workers=1)
    torch.save(trained(classifier, sampling_rate=1, nb_classes=3), tmp_path / "w.pth")
    torch.save(trained(pretrainer), tmp_path / "p.pth")
    torch.save({"module": build_detector(TINY, len(ACTIONS)).state_dict()}, tmp_path / "d.pth")
    deepspeed = states(tmp_path / "ds" / "checkpoint-best", classifier).parent.parent
    video = next(path for path in sorted((tmp_path / "a" / "videos").iterdir()) if path.suffix == ".mp4")
    size, cpu = ["--init-frames", "4", "--init-size", "32"], ["--device", "cpu"]
    tests = [*cpu, "--workers", "0", "--segments", "1", "--crops", "1", "--stride", "1"]
    boxes = ["--actions", str(actors["actions"]), "--videos", str(actors["videos"]), "--annotations"]
    short = "--num-frames 4 --image-size 32 --batch-size 2 --steps 1 --workers 0 --no-tensorboard --no-flip"
    names = tmp_path / "list.txt"
    names.write_text(f"{video}\n")
    val, train = str(labelled_world / "val.txt"), str(labelled_world / "train.txt")
    runs = [
        ["evaluate", val, "--checkpoint", tmp_path / "w.pth", *tests],
        ["evaluate", val, "--checkpoint", deepspeed, *size, *tests],
        ["predict", video, "--checkpoint", deepspeed, *size, *cpu],
        ["features", names, "--checkpoint", tmp_path / "w.pth", *cpu],
        ["reconstruct", video, "--checkpoint", tmp_path / "p.pth", *cpu],
        ["convert", deepspeed, tmp_path / "folder", "--num-frames", "4", "--image-size", "32"],
        ["export", deepspeed, tmp_path / "out.safetensors"],
        [
            "distil",
            "--data",
            train,
            "--teacher",
            deepspeed,
            "--init",
            tmp_path / "w.pth",
            *short.split(),
            *cpu,
        ],
        ["finetune-detection", *boxes, actors["train"], "--init", deepspeed, *size, *short.split(), *cpu],
        ["detect", *boxes, actors["val"], "--checkpoint", tmp_path / "d.pth", *size, *cpu, "--workers", "0"],
    ]
    for number, words in enumerate(runs):
        out = [] if words[0] in ("predict", "convert", "export") else ["--output", tmp_path / f"out{number}"]
        if words[0] == "reconstruct":
            out = ["--output", tmp_path / "picture.png"]
        assert main([str(word) for word in [*words, *out]]) == 0, (words[0], capsys.readouterr().err)
