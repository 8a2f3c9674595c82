"""The probe of a pre-training run: what it measures, that it changes nothing else, ranks, kills, the early
end, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vmae
from vmae import ModelConfig, build_pretrainer
from vmae.checkpoint.format import read_manifest
from vmae.checkpoint.models import to_model
from vmae.checkpoint.published import load_weights
from vmae.checkpoint.source import read_checkpoint
from vmae.cli import main
from vmae.config import PRESETS, MaskConfig
from vmae.data.classify_dataset import ClipConfig, MiddleClipDataset
from vmae.data.gallery import split_list
from vmae.data.labels import read_labelled_list
from vmae.model.classifier import AttentivePool
from vmae.model.cost import masked_macs
from vmae.tools.curves import describe, draw, read_curve, table
from vmae.train.loop import Trainer
from vmae.train.metrics import read_log
from vmae.train.parallel import Parallel
from vmae.train.pretrain_settings import PretrainConfig
from vmae.train.probe import ProbeSet, count_passes, pass_flops
from vmae.train.probe_readers import build_reader, nearest_neighbours, reader_macs, train_reader
from vmae.train.probe_settings import ProbeConfig
from vmae.train.resume import with_defaults
from vmae.train.validation import Validation

CONFIG = dict(img_size=32, patch_size=8, num_frames=8)


@pytest.fixture
def world(labelled_world, tmp_path):
    """A list of twelve videos of three classes."""
    path = tmp_path / "labelled.txt"
    shutil.copy(labelled_world / "train.txt", path)
    return path


@pytest.fixture
def probed(pretrain, world, monkeypatch):
    """`probed(output, *flags)`: a run with a probe every two steps, whose reader is trained for a few."""
    monkeypatch.setattr("vmae.train.probe_readers.READER_STEPS", 20)
    return lambda output, *flags: pretrain(output, "--probe-every", "2", "--probe-data", world, *flags)


def probes(folder):
    """What a run found, without how long it took."""
    found = [line for line in read_log(folder / "log.jsonl") if "probe_list" in line]
    return [{key: line[key] for key in line if key not in ("probe_s", "probe_share")} for line in found]


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_log(folder / "log.jsonl") if "loss" in line]


def same_weights(one, two, name="weights.pth"):
    first, second = load_weights(one / name), load_weights(two / name)
    return all(torch.equal(first[key], second[key]) for key in first)


# --- What is measured ---


def test_neighbours_vote_by_their_cosine():
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    labels, queries = torch.tensor([2, 2, 0, 0, 1]), torch.tensor([[5.0, 1.0], [0.1, 3.0], [-1.0, 0.0]])
    votes = torch.zeros(3, 3, dtype=torch.float64)
    for number, query in enumerate(F.normalize(queries.double(), dim=1)):
        for row, label in zip(F.normalize(gallery.double(), dim=1), labels):
            votes[number, label] += torch.exp(query @ row / 0.07)
    assert nearest_neighbours(gallery, labels, queries, 3).tolist() == votes.argmax(1).tolist() == [2, 0, 1]
    crowd = torch.cat([gallery[:1], gallery[2:3].expand(30, 2)])  # twenty vote, of thirty-one
    found = nearest_neighbours(crowd, torch.tensor([0] + [1] * 30), torch.tensor([[1.0, 0.3]]), 2)
    assert found.tolist() == [0]


def test_the_pool_of_normed_tokens_is_the_pool():
    """Values and gradients of the attentive pool, in an order that costs 1/64 of it for ViT-B."""
    pool = AttentivePool(48, 4, 1e-6).double()
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    tokens, upstream = torch.randn(3, 20, 48).double() * 2 + 1, torch.randn(3, 48).double()
    found = []
    for pooled in (pool(tokens), pool.of_normed(F.layer_norm(tokens, (48,), eps=1e-6))):
        found.append([pooled, *torch.autograd.grad((pooled * upstream).sum(), list(pool.parameters()))])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_reader_learns_what_a_mean_does_not_show():
    """Two classes with the same mean token: which of two tokens is marked tells them apart."""
    config, generator = ModelConfig.preset("vit_tiny", **CONFIG), torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    tokens = torch.randn(1, 16, config.embed_dim, generator=generator).repeat(80, 1, 1)
    tokens += 0.1 * torch.randn(80, 16, config.embed_dim, generator=generator)
    tokens[:, 0, 1] += 3 * (2.0 * labels - 1)
    tokens[:, 1, 1] -= 3 * (2.0 * labels - 1)
    state = torch.random.get_rng_state()
    reader = build_reader(config, 2, torch.device("cpu"))
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's random numbers moved on
    normed = reader.normed(tokens)
    train_reader(reader, [normed[:15], normed[15:40]], labels[:40], Parallel())
    assert (reader(normed[40:]).argmax(1) == labels[40:]).all()
    again = build_reader(config, 2, torch.device("cpu"))
    train_reader(again, [normed[:15], normed[15:40]], labels[:40], Parallel())
    assert all(torch.equal(one, two) for one, two in zip(reader.parameters(), again.parameters()))


def test_tokens_are_those_of_the_encoder(tmp_path, pretrain, world):
    """The same as a classifier built of the run's encoder gives, the norm at its end included."""
    assert pretrain(tmp_path / "run") == 0
    encoder, _ = to_model(read_checkpoint(tmp_path / "run"), "encoder", {})
    model = build_pretrainer(encoder.config)
    model.load_state_dict(load_weights(tmp_path / "run" / "weights.pth"))
    clips = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model.tokens(clips), encoder.eval().tokens(clips), rtol=1e-5, atol=1e-5)


def test_a_pass_finds_what_its_readers_find_one_video_after_the_other(world):
    config = ModelConfig(**CONFIG, **PRESETS["vit_tiny"])
    model, labelled = build_pretrainer(config), read_labelled_list(world)
    gallery, clip = split_list(labelled, 100, "list"), ClipConfig(num_frames=8, image_size=32, stride=1)
    options = dict(measure="knn", parallel=Parallel(), dtype="float32")
    videos = ProbeSet(gallery, config, clip, batch_size=4, **options)
    scores, failed = videos.score(model)
    assert failed == [] and scores["videos"] == 12 and model.training
    data, labels = MiddleClipDataset(gallery.entries, clip), torch.from_numpy(gallery.labels)
    with torch.no_grad():
        tokens = torch.cat([model.eval().tokens(data[video]) for video in range(12)])
    voted = nearest_neighbours(tokens[:6].mean(1), labels[:6], tokens[6:].mean(1), 3)
    assert scores["knn"] == pytest.approx(100 * (voted == labels[6:]).float().mean().item())
    reader = build_reader(config, 3, torch.device("cpu"))
    train_reader(reader, [reader.normed(tokens[:6])], labels[:6], Parallel())
    right = reader(reader.normed(tokens[6:])).argmax(1) == labels[6:]
    assert scores["attentive"] == pytest.approx(100 * right.float().mean().item())
    assert scores["knn"] == 100  # colours are seen by fresh weights too
    assert len(videos.kept) == 12 and videos.score(model)[0] == scores  # of the clips that were kept


@pytest.mark.slow
def test_workers_decode_once_or_for_each_pass(world, monkeypatch):
    config = ModelConfig(**CONFIG, **PRESETS["vit_tiny"])
    gallery, model = split_list(read_labelled_list(world), 100, "list"), build_pretrainer(config)
    options = dict(measure="knn", parallel=Parallel(), dtype="float32", batch_size=4, num_workers=1)
    clip, found = ClipConfig(num_frames=8, image_size=32, stride=1), []
    for most in (2**30, 1):
        monkeypatch.setattr("vmae.train.probe.KEEP_BYTES", most)
        videos = ProbeSet(gallery, config, clip, **options)
        with videos.opened():
            found += [videos.score(model)[0], videos.score(model)[0]]
            assert (videos._pool is None, len(videos.kept)) == ((True, 12) if most > 1 else (False, 0))
    assert all(one == found[0] for one in found)


# --- In a run ---


def test_a_run_with_a_probe_trains_as_one_without(probed, pretrain, tmp_path, capsys):
    """To the bit, with stochastic depth; there is a probe before the first step and after the last."""
    assert pretrain(tmp_path / "plain", "--drop-path", "0.3") == 0
    assert probed(tmp_path / "run", "--drop-path", "0.3", "--probe-every", "4") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert same_weights(tmp_path / "run", tmp_path / "plain")
    found = probes(tmp_path / "run")
    assert [line["step"] for line in found] == [0, 4, 6] and found[0]["probe_videos"] == 12
    assert all(
        line["probe_s"] > 0 for line in read_log(tmp_path / "run" / "log.jsonl") if "probe_list" in line
    )
    said = capsys.readouterr()
    assert "gallery of 6 videos, 6 queries, one clip each, every 4 steps" in said.out
    assert "warning: the probes take more than 1% of the run's FLOPs" in said.out
    assert "are trained on too" in said.out and "best probe: step 0, attentive" in said.out
    assert "of the time so far" in said.err
    best = max(found, key=lambda line: (line["probe_attentive"], -line["step"]))["step"]
    assert os.readlink(tmp_path / "run" / "checkpoint-best") == f"checkpoint-{best:08}"
    assert (tmp_path / "run" / "weights_best.pth").is_file()


@pytest.mark.parametrize("owner, name, count", [(ProbeSet, "_round", 8), (Trainer, "clip", 4)])
@pytest.mark.slow
def test_a_run_that_is_cut_short_ends_as_the_whole_one(probed, tmp_path, monkeypatch, owner, name, count):
    """In a probe, and in the step after one; saved in the background."""
    flags = ["--save-every", "3", "--async-save"]
    assert probed(tmp_path / "whole", *flags) == 0
    plain, calls = getattr(owner, name), []

    def method(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    assert probed(tmp_path / "run", *flags) == 130
    monkeypatch.setattr(owner, name, plain)
    assert probed(tmp_path / "run", *flags) == 0
    assert probes(tmp_path / "run") == probes(tmp_path / "whole") and same_weights(
        tmp_path / "run", tmp_path / "whole"
    )
    assert [line["step"] for line in probes(tmp_path / "run")] == [0, 2, 4, 6]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def scores_on_ranks(kind, path):
    from vmae.train.parallel import open_parallel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(**CONFIG, **PRESETS["vit_tiny"])
    gallery = split_list(read_labelled_list(path), 100, "list")
    clip = ClipConfig(num_frames=8, image_size=32, stride=1)
    with open_parallel(kind, "cpu") as parallel:
        model = build_pretrainer(config)
        wrapped = parallel.wrap(model, [*model.encoder.blocks, *model.decoder.blocks])
        videos = ProbeSet(
            gallery, config, clip, measure="knn", parallel=parallel, dtype="float32", batch_size=2
        )
        return [videos.score(wrapped)[0] for _ in range(2)]


@pytest.mark.slow
def test_any_number_of_ranks_finds_the_same(run_ranks, world):
    """One, two sharded, and more ranks than videos to ask; each video once."""
    (alone,) = run_ranks(1, scores_on_ranks, "none", world)
    assert alone[0] == alone[1] and alone[0]["videos"] == 12
    for count, kind in ((2, "fsdp"), (2, "ddp"), (7, "ddp")):
        assert run_ranks(count, scores_on_ranks, kind, world) == [alone] * count, (count, kind)


def train_on_ranks(world, output, kind, batch):
    torch.set_num_threads(1)
    size = "--model vit_tiny --image-size 32 --patch-size 8 --num-frames 8 --stride 1".split()
    run = "--encoder-ratio 0.75 --steps 2 --workers 0 --lr 0.01 --log-every 1 --device cpu".split()
    lists = ["--data", str(world.with_name("plain.txt")), "--probe-every", "1", "--probe-data", str(world)]
    where = ["--output", str(output), "--parallel", kind, "--batch-size", batch]
    return main(["pretrain", *lists, *where, *size, *run])


@pytest.mark.slow
def test_two_sharded_ranks_train_and_probe_as_one(run_ranks, world, labelled_world, tmp_path):
    plain = "".join(f"{labelled_world}/v{video:02} 1 10\n" for video in range(12))
    world.with_name("plain.txt").write_text(plain)
    assert run_ranks(1, train_on_ranks, world, tmp_path / "one", "none", "4") == [0]
    assert run_ranks(2, train_on_ranks, world, tmp_path / "two", "fsdp", "2") == [0, 0]
    one, two = probes(tmp_path / "one"), probes(tmp_path / "two")
    assert len(one) == 3 and one == two
    assert [loss for _, loss in losses(tmp_path / "two")] == pytest.approx(
        [loss for _, loss in losses(tmp_path / "one")], rel=1e-5
    )


@pytest.mark.slow
def test_patience_ends_a_run_that_can_go_on(probed, tmp_path, monkeypatch, capsys):
    """Better by the margin only counts; the run is complete, and a larger patience continues it."""
    found = iter([50.0, 60.0, 60.5, 60.9])
    plain = ProbeSet.score

    def score(self, *args):
        scores, failed = plain(self, *args)
        return {**scores, "attentive": next(found)}, failed

    monkeypatch.setattr(ProbeSet, "score", score)
    flags = ["--probe-every", "1", "--probe-margin", "1"]
    assert probed(tmp_path / "run", *flags, "--probe-patience", "2") == 0
    said = capsys.readouterr().out
    assert "ended early at step 3 of 6: 2 probes without a better one (by 1 points); a larger" in said
    assert "best probe: step 3, attentive 60.90 %" in said  # by less, but the best
    assert os.readlink(tmp_path / "run" / "checkpoint-best") == "checkpoint-00000003"
    assert (tmp_path / "run" / "weights.pth").is_file() and (tmp_path / "run" / "weights_best.pth").is_file()
    found = iter([62.0, 60.0, 60.0])
    assert probed(tmp_path / "run", *flags, "--probe-patience", "9") == 0
    assert [line["step"] for line in probes(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 6]


def test_a_goal_ends_a_run_that_a_higher_one_continues(probed, tmp_path, monkeypatch, capsys):
    """The step of the first probe that reaches it, and the FLOPs of training until then, counted."""
    found = iter([10.0, 49.9, 50.0])
    plain = ProbeSet.score

    def score(self, *args):
        scores, failed = plain(self, *args)
        return {**scores, "attentive": next(found)}, failed

    monkeypatch.setattr(ProbeSet, "score", score)
    flags = ["--probe-every", "1"]
    assert probed(tmp_path / "run", *flags, "--probe-goal", "50") == 0
    settings = read_manifest(tmp_path / "run" / "checkpoint-00000002")["config"]
    model, mask = ModelConfig.from_dict(settings["model"]), MaskConfig(**settings["mask"])
    flops = 2 * 6 * masked_macs(model, mask)  # two videos a step, a clip each
    assert [line["probe_flops"] for line in probes(tmp_path / "run")] == [0, flops, 2 * flops]
    said = capsys.readouterr().out
    assert f"probe reached 50 % at step 2 of 6 after {2 * flops:.4g} FLOPs of training; without" in said
    assert losses(tmp_path / "run")[-1][0] == 2 and (tmp_path / "run" / "weights.pth").is_file()
    assert probed(tmp_path / "run", *flags, "--probe-goal", "50") == 0  # nothing more
    assert losses(tmp_path / "run")[-1][0] == 2
    found = iter([60.0, 71.0])
    assert probed(tmp_path / "run", *flags, "--probe-goal", "70") == 0
    assert [line["step"] for line in probes(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_the_measure_that_decides(probed, tmp_path):
    assert probed(tmp_path / "run", "--probe-measure", "knn") == 0
    found = probes(tmp_path / "run")
    best = max(found, key=lambda line: (line["probe_knn"], -line["step"]))["step"]
    assert os.readlink(tmp_path / "run" / "checkpoint-best") == f"checkpoint-{best:08}"


def test_queries_of_their_own(probed, labelled_world, tmp_path, capsys):
    assert probed(tmp_path / "run", "--probe-val", labelled_world / "val.txt", "--probe-videos", "10") == 0
    assert "gallery of 5 videos, 5 queries" in capsys.readouterr().out
    assert probes(tmp_path / "run")[0]["probe_videos"] == 10


def test_the_share_of_the_work_that_is_told(probed, tmp_path, capsys):
    """Counted by hand: the encoder forward, the reader, and training."""
    assert probed(tmp_path / "run", "--dry-run") == 0
    told = json.loads(capsys.readouterr().out)["derived"]["probe"]
    assert (told["gallery"], told["queries"]) == (6, 6) and not (tmp_path / "run").exists()
    assert 0 < told["flops_share"] < 1
    assert [count_passes(4, steps) for steps in (1, 4, 5, 8)] == [2, 2, 3, 3]
    config = ModelConfig.preset("vit_b")
    assert reader_macs(config, 10) == 2 * 1568 * 768 * 12 + 2 * 768 * 768 + 768 * 10
    gallery = split_list(read_labelled_list(tmp_path / "labelled.txt"), 12, "list")
    per_video = pass_flops(gallery, config) / 12
    encoder, reader = 2 * 180.5e9, 0.075  # the paper's GFLOPs of ViT-B; the reader's share beside them
    assert per_video == pytest.approx(encoder * (1 + reader), rel=0.01)


# --- Broken videos and bad input ---


def test_broken_videos_are_counted_and_stop_nothing_unless_all_are(probed, world, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    world.write_text(world.read_text() + f"{tmp_path}/bad.mp4 0\n{tmp_path}/bad.mp4 1\n")
    assert probed(tmp_path / "run") == 0
    assert {(line["probe_videos"], line["probe_undecodable"]) for line in probes(tmp_path / "run")} == {
        (12, 2)
    }
    assert "12 videos (2 not decoded)" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{tmp_path}/bad.mp4 {label}\n" for label in (0, 0, 1)))
    assert probed(tmp_path / "b", "--probe-data", other) == 2
    assert "list to probe on: all 3 videos are undecodable" in capsys.readouterr().err


def test_videos_that_all_break_before_the_first_step(world):
    config = ModelConfig(**CONFIG, **PRESETS["vit_tiny"])
    gallery = split_list(read_labelled_list(world), 100, "list")
    clip = ClipConfig(num_frames=8, image_size=32, stride=1)
    videos = ProbeSet(
        gallery, config, clip, measure="knn", parallel=Parallel(), dtype="float32", batch_size=4
    )
    for number in gallery.gallery:
        videos.dataset.block(number, "broken")
    steps = dict(every=1, total_steps=4, steps_per_epoch=1, at_start=True)
    tested = Validation(videos, build_pretrainer(config), **steps)
    with pytest.raises(vmae.InputError, match="nothing to probe on: no video of the gallery.*left out"):
        tested.test(0)
    record = tested.test(1)
    assert record["probe_knn"] is None and not tested.improves(record)
    assert "nothing to probe on" in tested.describe(record)[0]


@pytest.mark.parametrize(
    "flags, text",
    [
        ("--probe-every 3", "--probe-every 3 needs labelled videos: --probe-data LIST"),
        ("--probe-data x.txt", "--probe-data x.txt needs --probe-every N, in steps"),
        ("--probe-goal 50", "are about probes: name --probe-every N and --probe-data LIST"),
        ("--probe-goal 0", "--probe-goal: must be a number above 0 and at most 100"),
        ("--probe-patience 2", "are about probes: name --probe-every N and --probe-data LIST"),
        ("--probe-every 3 --probe-data x.txt --probe-margin 1", "--probe-margin 1 needs --probe-patience N"),
        ("--probe-every 3 --probe-data {plain}", "list to probe on"),
        ("--probe-every 3 --probe-data {single}", "no class of two videos"),
        ("--probe-every 3 --probe-data {several}", "has videos of several labels; a probe takes one class"),
        ("--probe-every 3 --probe-data {single} --probe-val {several}", "has videos of several labels"),
        ("--probe-every 3 --probe-data {zeros} --probe-val {ones}", "have no class in common"),
        ("--probe-every 3 --probe-data {single} --probe-measure best", "unknown measure of a probe 'best'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    pretrain, labelled_world, tmp_path, capsys, flags, text
):
    lists = {
        "plain": ["v00 10", "v01 10"],
        "single": ["v00 10 0", "v01 10 1"],
        "several": ["v00 10 0;1", "v01 10 1"],
        "zeros": ["v00 10 0", "v01 10 0"],
        "ones": ["v02 10 1", "v03 10 1"],
    }
    paths = {}
    for name, lines in lists.items():
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_text("".join(f"{labelled_world}/{line}\n" for line in lines))
    try:
        code = pretrain(tmp_path / "run", *flags.format(**paths).split())
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_checkpoints_from_before_probes_go_on(probed, pretrain, tmp_path):
    """A probe may come and go between two starts: it decides no weights."""
    assert pretrain(tmp_path / "run", "--save-every", "3", "--keep", "9") == 0
    about = read_manifest(tmp_path / "run" / "checkpoint-00000003")["config"]
    before = {name: value for name, value in about.items() if name != "probe"}  # as older code wrote it
    assert with_defaults(before, PretrainConfig.from_dict(about)) == about
    assert probed(tmp_path / "run", "--resume", tmp_path / "run" / "checkpoint-00000003") == 0
    assert [line["step"] for line in probes(tmp_path / "run")] == [4, 6]


def test_the_settings_by_themselves():
    assert ProbeConfig() == ProbeConfig.from_dict({}) and ProbeConfig().every is None
    with pytest.raises(vmae.InputError, match="videos must be a whole number from 2"):
        ProbeConfig(every=1, data="x", videos=1)


# --- Curves ---


def test_curves_show_probes(probed, pretrain, tmp_path):
    assert probed(tmp_path / "run") == 0 and pretrain(tmp_path / "plain") == 0
    curves = [read_curve(tmp_path / name) for name in ("run", "plain")]
    found = probes(tmp_path / "run")
    best = max(line["probe_attentive"] for line in found)
    lines = table(curves)
    assert lines[0].endswith("best probe") and lines[1].endswith(f"{best:.2f}") and lines[2].endswith("-")
    values = describe(curves)["curves"][0]["values"]
    assert values["probe_knn"] == {"step": [0, 2, 4, 6], "value": [line["probe_knn"] for line in found]}
    assert "probe_knn" not in describe(curves)["curves"][1]["values"]
    draw(curves, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert np.isfinite(values["probe_attentive"]["value"]).all()
