"""What packed clips take to make, keep and read; the page on 100 million clips is right."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from vmae import MaskConfig, ModelConfig
from vmae.cli import main
from vmae.data.mix import Mix, Source
from vmae.data.needs import PACKED
from vmae.data.shards.entries import Place, Shard
from vmae.data.shards.index import Sample, ShardIndex, bytes_per_sample, columns_of, write_index
from vmae.planning.budget import Cluster, Plan, Row, Workload
from vmae.planning.memory import Memory
from vmae.planning.storage import (
    CHECK_CPU_S,
    KEY_BYTES,
    LINE_BYTES,
    PACK_CPU_S,
    PACKED_BYTES_PER_S,
    TAR_BYTES,
    Storage,
    need_line,
    node_load,
    plan_storage,
    storage_lines,
    with_known_bytes,
)

ROOT = Path(__file__).resolve().parents[2]


def plan_with(clips_per_s, **work):
    cluster = Cluster(gpus=16, gpus_per_node=8, peak_flops=None if clips_per_s is None else 1e15)
    usual = {"batch_size": 4, "num_sample": 4, "effective_batch": 64, "videos": 1000, "num_workers": 3}
    row = Row("none", "off", "ddp", 4, Memory(0, 0, 0, 0, 0, 0), True, 8, 1.0, 0.5, None, None, clips_per_s)
    config, mask = ModelConfig.preset("vit_tiny"), MaskConfig()
    return Plan(config, mask, cluster, Workload(**usual | work), 1_000_000, 1.0, [row])


def test_bytes_shards_hours_and_money():
    storage = Storage(
        clip_seconds=5, packed_bytes=1e6 - TAR_BYTES, shard_bytes=1e8, pack_cpu=0.36, check_cpu=0.036,
        pack_cores=10, price_month=0.5, price_requests=1e6, price_transfer=2,
    )  # fmt: skip
    found = plan_storage(plan_with(80.0), storage, videos=1000)
    assert found.total_bytes == 1e9 and found.shards == 10
    assert found.index_bytes == 1000 * bytes_per_sample(KEY_BYTES) and found.list_bytes == 1000 * LINE_BYTES
    assert found.pack_core_hours == pytest.approx(0.5) and found.pack_days == pytest.approx(0.5 / 240)
    assert found.check_core_hours == pytest.approx(0.01)
    assert found.month_price == 0.5 and found.checkpoint_bytes == 12_000_000
    assert found.epoch_price == pytest.approx(1000 * 1 + 2 * (1 - 1000 * TAR_BYTES / 1e9))


def test_requests_cores_and_batches_ahead():
    found = plan_storage(plan_with(4 * 11_001.0), Storage(packed_bytes=1e5, videos_per_core=100), videos=1000)
    assert found.reads_per_s == 11_001 and found.read_bytes_per_s == pytest.approx(1.1001e9)
    assert found.prefixes == 3 and found.cores == pytest.approx(110.01)
    assert found.gpu_cores == pytest.approx(110.01 / 16)
    assert found.ahead_s == pytest.approx(16 * 3 * 2 * 4 / 11_001)
    assert found.slow_steps == pytest.approx(1 - 0.9999**64)
    assert plan_storage(plan_with(40.0), Storage(), 1000).cores == pytest.approx(10 / PACKED.videos_per_s(4))


def test_without_a_known_rate():
    plan = plan_with(None)
    found = plan_storage(plan, Storage(), videos=1000)
    assert (found.reads_per_s, found.cores, found.prefixes, found.ahead_s) == (None,) * 4
    assert found.month_price is None and found.epoch_price is None
    text = "\n".join(storage_lines(found, Storage(), 16))
    assert "requests" not in text and "1,000 videos of 10 s" in text and "a month" not in text
    assert "cores" not in need_line(node_load(plan, 10, 4))


def test_repeats_are_read_again_and_kept_once():
    found = plan_storage(plan_with(80.0, videos=5000), Storage(), videos=1000)
    assert found.videos == 1000 and found.epoch_reads == 5000 and found.order_bytes == 5000 * 4


def test_the_index_is_as_large_as_planned(tmp_path):
    samples = [Sample(f"{number:036}", 0, Place(number, 1, 2)) for number in range(2000)]
    index = ShardIndex(columns_of(samples, [""], [".mp4"]), [Shard("0.tar", 10**9)])
    write_index(tmp_path / "index.vmae", index)
    size = (tmp_path / "index.vmae").stat().st_size
    assert 2000 * bytes_per_sample(36) <= size < 2000 * bytes_per_sample(36) + 20_000


def test_bytes_of_an_index_are_known():
    samples = [Sample(str(number), 0, Place(0, size, 0), table=(0, 4)) for number, size in enumerate((6, 16))]
    index = ShardIndex(columns_of(samples, [""], [".mp4"]), [Shard("0.tar", 100)])
    mix = Mix(index, [Source("index", 0, 2, 1.0, "")])
    assert with_known_bytes(Storage(), mix).packed_bytes == 15
    assert with_known_bytes(Storage(packed_bytes=7.0), mix).packed_bytes == 7
    assert with_known_bytes(Storage(), []).packed_bytes is None


def test_what_a_machine_needs():
    load = node_load(plan_with(80.0), batch_bytes=2**20, checkpoints=4)
    assert (load.ranks, load.world, load.workers, load.videos_per_s) == (8, 16, 3, 80 / 4 / 16)
    assert load.disk_bytes == 48_000_000
    assert "45.8 MiB of disk for checkpoints;" in need_line(load)
    many = dataclasses.replace(load, videos_per_s=10 * PACKED.videos_per_s(4))
    assert "(--workers 10)" in need_line(many) and "80 cores" in need_line(many)
    assert node_load(plan_with(80.0), batch_bytes=0, checkpoints=4).workers == 0


def test_rates_are_those_of_the_committed_results():
    records = json.loads((ROOT / "bench/results/cpu/needs.json").read_text())["records"]
    (clips,) = [record for record in records if record["kind"] == "clips"]
    assert PACKED_BYTES_PER_S == pytest.approx(clips["packed_bytes"] / clips["seconds"], rel=0.02)
    # CPU seconds vary with what else the machine does
    assert PACK_CPU_S == pytest.approx(clips["pack_cpu_s"]["median"] / clips["seconds"], rel=0.15)
    assert CHECK_CPU_S == pytest.approx(clips["check_cpu_s"]["median"] / clips["videos"], rel=0.15)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--clip-seconds 0", "must be a number above 0"),
        ("--packed-bytes nan", "must be a number above 0"),
        ("--shard-bytes 0", "must be a memory size above 0"),
        ("--pack-cores 0", "must be a whole number from 1"),
        ("--price-month -1", "must be a number at least 0"),
    ],
)
def test_wrong_numbers_are_one_line(capsys, flags, message):
    assert main(["plan", "--model", "vit_tiny", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow
def test_json_has_it_too(capsys):
    flags = "--model vit_tiny --image-size 64 --num-frames 8 --encoder-ratio 0.75 --checkpointing none"
    flags += " --gpus 1 --videos 100_000_000 --workers 2 --price-month 1 --json -"
    assert main(["plan", *flags.split()]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["data"]["videos"] == 100_000_000 and content["data"]["reads_per_s"] > 0
    assert content["data"]["month_price"] == pytest.approx(content["data"]["total_bytes"] / 1e9)
    assert content["needs_per_node"]["open_files_per_process"] > 256
    assert content["needs_per_node"]["shared_memory"] == content["shared_memory_per_node"]


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print():
    spec = importlib.util.spec_from_file_location("write_plans", ROOT / "docs" / "write_plans.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text("utf-8")
    assert text.count("```text\nrecommendation: ") == 2
    assert script.rewritten(text.replace("core hours", "hours")) == text, "run `python docs/write_plans.py`"


@pytest.mark.slow
def test_the_cores_that_a_page_names(capsys):
    """docs/data_at_scale.md, on ViT-B at 35 % of an H100."""
    text = (ROOT / "docs" / "data_at_scale.md").read_text("utf-8").replace("\n", " ")
    told = re.search(
        r"takes (\d+) videos a second with four clips each, and ([\d.]+) cores decode them", text
    )
    flags = "--model vit_b --gpus 1 --mfu 0.35 --checkpointing none --json -"
    assert main(["plan", *flags.split()]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (round(data["reads_per_s"]), round(data["gpu_cores"], 1)) == (int(told[1]), float(told[2]))
