"""A run whose shards lie in a store that fails: no sample is lost, and none is repeated or replaced."""

import contextlib
import io
import json
import os
import signal
import threading
import time

import pytest
from shard_files import write_shards
from store_server import SECRET, Relay

from vmae.cli import main
from vmae.config import PRESETS
from vmae.data.manifest import VideoEntry
from vmae.data.shards import source, stores

MICRO = dict(embed_dim=48, depth=1, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
FLAGS = (
    "--model micro --image-size 32 --patch-size 8 --num-frames 8 --stride 1 --encoder-ratio 0.75 "
    "--no-tensorboard --batch-size 2 --lr 0.1 --log-every 1 --device cpu --workers 2 --save-every 1000"
).split()


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(PRESETS, "micro", MICRO)


@pytest.fixture(scope="module")
def index(tmp_path_factory, labelled_world):
    entries = [VideoEntry(f"{labelled_world}/v{number:02}", "frames", 1, 10) for number in range(12)]
    return write_shards(tmp_path_factory.mktemp("shards"), entries)


def pretrain(data, output, steps=60):
    return main(["pretrain", "--data", str(data), "--output", str(output), *FLAGS, "--steps", str(steps)])


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def expected(index, tmp_path):
    assert pretrain(index, tmp_path / "local") == 0
    return losses(tmp_path / "local")


def secret_in(folder):
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def later(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again(
    store, index, tmp_path, expected, at_step, capfd, monkeypatch
):
    address = store.upload(index, "killed")
    monkeypatch.setattr(stores, "MOST_PAUSE_S", 1.0)  # the workers are forked from here
    timers = []

    def kill():
        store.kill()
        timers.append(later(1.0, lambda: store.start(wait=False)))

    for step in (5, 30):
        at_step(step, kill)
    assert pretrain(address, tmp_path / "run") == 0
    for timer in timers:
        timer.join()
    assert len(timers) == 2 and losses(tmp_path / "run") == expected
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    out, err = capfd.readouterr()
    assert not secret_in(tmp_path / "run") and SECRET not in out + err
    store.put("ready/ready", b"ready")


@pytest.mark.slow
@pytest.mark.parametrize("faults", [{"fail_every": 20}, {"delay_s": 0.05, "rate": 2e6}])
def test_errors_and_a_slow_network(store, index, tmp_path, expected, monkeypatch, faults):
    address = store.upload(index, "slow")
    with Relay(store.port, **faults) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
        assert pretrain(address, tmp_path / "run") == 0
    assert relay.requests > 100 and relay.failed == relay.requests // 20 * ("fail_every" in faults)
    assert losses(tmp_path / "run") == expected and not (tmp_path / "run" / "quarantine.jsonl").exists()


@pytest.mark.slow
def test_a_store_that_is_gone_stops_the_run_which_goes_on(store, index, tmp_path, expected, at_step, capfd):
    address = store.upload(index, "gone")
    os.environ["VMAE_STORE_PATIENCE_S"] = "1.5"
    try:
        at_step(7, store.kill)
        assert pretrain(address, tmp_path / "run") == 75
    finally:
        del os.environ["VMAE_STORE_PATIENCE_S"]
        store.start()
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"{address.rpartition('/')[0]}/shard-0000" in line and "it cannot be reached" in line
    assert "goes on from there" in line and SECRET not in err and "Traceback" not in err
    done = losses(tmp_path / "run")
    assert 7 <= len(done) < 60 and done == expected[: len(done)]
    assert (
        f"after step {len(done)};" in line
    )  # and its checkpoint is there, though --save-every is not reached
    assert pretrain(address, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == expected and not (tmp_path / "run" / "quarantine.jsonl").exists()
    assert not secret_in(tmp_path / "run")


def _on_a_rank(address, output, patience, first, killed):
    """A run in a rank, whose server is killed by rank 0 after its first steps; (exit code, stderr)."""
    from vmae.train.loop import Trainer

    os.environ["VMAE_STORE_PATIENCE_S"] = patience
    plain = Trainer.clip

    def clip(self, record):
        if first and self.step == 5 and os.environ["RANK"] == "0":
            os.kill(killed, signal.SIGKILL)
        return plain(self, record)

    Trainer.clip = clip  # of this fork
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = pretrain(address, output, 40)
    return code, err.getvalue()


@pytest.mark.slow
def test_all_ranks_stop_with_one_checkpoint_and_go_on(store, index, tmp_path, run_ranks):
    address = store.upload(index, "ranks")
    (code, _), (other, _) = run_ranks(2, _on_a_rank, index, tmp_path / "local", "600", False, 0)
    assert code == other == 0
    found = run_ranks(2, _on_a_rank, address, tmp_path / "run", "1.5", True, store.process.pid)
    store.kill()
    store.start()
    assert [code for code, _ in found] == [75, 75]
    for _, err in found:
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "error: rank " in line and "it cannot be reached" in line and SECRET not in err
    done = len(losses(tmp_path / "run"))
    assert 5 <= done < 40 and f"after step {done};" in line
    found = run_ranks(2, _on_a_rank, address, tmp_path / "run", "600", False, 0)
    assert [code for code, _ in found] == [0, 0]
    assert losses(tmp_path / "run") == losses(tmp_path / "local")


@pytest.mark.slow
def test_waiting_is_no_hang_of_a_video_and_can_be_stopped(store, index, tmp_path, expected, at_step, capfd):
    """Neither is a worker replaced, nor a video blamed, nor a signal left waiting."""
    address = store.upload(index, "waits")
    os.environ["VMAE_HANG_S"] = "0.5"

    def kill():
        store.kill()
        timers.append(later(4.0, lambda: os.kill(os.getpid(), signal.SIGTERM)))

    timers = []
    try:
        at_step(7, kill)
        began = time.monotonic()
        assert pretrain(address, tmp_path / "run") == 0
        assert time.monotonic() - began < 30
    finally:
        del os.environ["VMAE_HANG_S"]
        store.start()
    assert "stopped by SIGTERM after step" in capfd.readouterr().out
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
    assert pretrain(address, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == expected and not (tmp_path / "run" / "quarantine.jsonl").exists()


@pytest.mark.slow
def test_a_shard_that_changes_in_a_run_stops_it(store, index, tmp_path, at_step, capfd, monkeypatch):
    address = store.upload(index, "swapped")
    name = "shard-00002.tar"
    content = (index.parent / name).read_bytes()
    at_step(7, lambda: store.put(f"tests/swapped/{name}", content[:-512] + b"x" * 512))
    assert pretrain(address, tmp_path / "run") == 75
    assert f"swapped/{name} was changed since its index was made (ETag)" in capfd.readouterr().err
    monkeypatch.setattr(source, "_checked", set())  # as in another process
    assert pretrain(address, tmp_path / "run") == 2
    assert f"swapped/{name} was changed since its index was made (ETag)" in capfd.readouterr().err
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
