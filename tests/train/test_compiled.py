"""Compiled blocks: few graphs whatever the drop rates, on one process and on two; counts of them."""

import io

import pytest
import torch
from torch import nn

from vmae import DualMask, InputError, MaskConfig, ModelConfig, build_pretrainer
from vmae.checkpoint import export_weights
from vmae.cli import build_parser
from vmae.config import SpeedConfig
from vmae.model.blocks import DropPath, build_blocks
from vmae.model.target import Target
from vmae.targets.building import build_target
from vmae.targets.settings import TargetConfig, Wanted
from vmae.train import compiled
from vmae.train.activations import prepare_blocks
from vmae.train.checks import resolve_compile
from vmae.train.compiled import Compilations, CompileWatch, why_not_compiled
from vmae.train.metrics import RunLog, read_log
from vmae.train.parallel import open_parallel
from vmae.train.pretrain_settings import configs_from_args

DEEP = ModelConfig(
    img_size=32,
    patch_size=8,
    num_frames=8,
    embed_dim=48,
    depth=12,
    num_heads=3,
    decoder_embed_dim=32,
    decoder_depth=4,
    decoder_num_heads=2,
    drop_path_rate=0.3,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No code is written: what is counted is torch's tracing, and its graphs run as they are."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    compiled.set_compiler()


def count_run(
    kind: str, dtype: str, steps: int = 2, target: Target | None = None, **options
) -> tuple[Compilations, list[str], float]:
    """What torch compiles in some steps of a deep model, why it stopped, and the last loss."""
    with open_parallel(kind, "cpu") as parallel:
        torch.manual_seed(0)
        model = build_pretrainer(DEEP, backend="torch", target=target)
        blocks = [*model.encoder.blocks, *model.decoder.blocks]
        prepare_blocks(blocks, compiled=True, **options)
        wrapped = parallel.wrap(model, blocks, dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(parallel.rank)
        mask = DualMask.sample(2, DEEP.grid, **MaskConfig().to_dict(), generator=generator)
        clips = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8, generator=generator)
        watch, told = CompileWatch(), []
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = wrapped(clips, mask)
            loss.backward()
            optimizer.step()
            told += watch.look()
        assert loss.isfinite()
        return watch.now, told, loss.item()


def assert_few(now: Compilations, told: list[str]) -> None:
    """Encoder and decoder, the first block of each (which drops nothing) and the others: not one a rate."""
    assert 4 <= now.graphs <= 5 and now.recompilations == now.graphs - 1
    assert (now.breaks, now.failed, told) == (0, 0, [])


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"checkpointing": "selective"}, marks=pytest.mark.slow),
        pytest.param({"checkpointing": "full"}, marks=pytest.mark.slow),
        pytest.param({"recompute": "on"}, marks=pytest.mark.slow),
        pytest.param({"recompute": "off"}, marks=pytest.mark.slow),
        pytest.param({"recompute": "budget"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options.values()) or "none",
)
def test_twelve_drop_rates_are_a_few_graphs(options):
    now, told, _ = count_run("none", "float32", **options)
    assert_few(now, told)


@pytest.mark.slow
def test_another_target_compiles_as_few_graphs(tmp_path):
    """The student's blocks; a teacher's are not compiled."""
    config = DEEP.replace(depth=1, decoder_depth=1)
    weights = build_pretrainer(config).state_dict()
    export_weights(tmp_path / "teacher.pth", weights, config={"model": config.to_dict()})
    settings = TargetConfig(name="teacher", teacher=str(tmp_path / "teacher.pth"))
    now, told, _ = count_run("none", "float32", target=build_target(Wanted(DEEP, settings)))
    assert_few(now, told)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_so_they_are_on_two_ranks(run_ranks, monkeypatch, kind):
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # traced the same, in half the time
    for now, told, _ in run_ranks(2, count_run, kind, "bfloat16"):
        assert_few(now, told)


class OldDropPath(DropPath):
    """Its rate is a number that a graph holds as a constant."""

    def forward(self, x, lengths=None):
        keep = x.new_empty((x.shape[0], 1, 1)).bernoulli_(1 - self.rate).div_(1 - self.rate)
        return x * keep if self.training and self.rate else x


@pytest.mark.slow
def test_a_limit_that_is_hit_is_told_with_its_reason(monkeypatch):
    monkeypatch.setattr("vmae.model.blocks.DropPath", OldDropPath)
    monkeypatch.setattr(compiled, "GRAPHS", 4)  # a limit of 8
    now, told, _ = count_run("none", "float32", steps=1)
    assert now.graphs == 8 and now.failed == 1 and now.recompilations == 7
    (reason,) = told
    assert "runs uncompiled from here on: Dynamo recompile limit exceeded" in reason and ".rate" in reason


def test_a_graph_that_ends_early_is_told():
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    watch = CompileWatch()
    torch.compile(broken, backend="eager")(torch.ones(3))
    (reason,) = watch.look()
    assert reason.startswith("a graph ends early: ") and watch.now == Compilations(graphs=2, breaks=1)
    assert watch.look() == []
    assert str(watch.now) == "2 graphs, 0 recompilations, 1 graph breaks"


def test_the_log_counts_what_was_compiled_once(tmp_path):
    stream = io.StringIO()
    log = RunLog(tmp_path, 0, 3, tensorboard=False, stream=stream, quiet_s=1e9)

    def step(done):
        log.step(done, loss=1.0, clips=1, step_s=1.0, data_s=0.0)
        log.record({"step": done})

    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    step(1)
    double(torch.ones(2))
    step(2)
    step(3)
    log.close()
    counts = [record.get("compiled") for record in read_log(tmp_path / "log.jsonl")]
    assert counts == [None, {"graphs": 1, "recompilations": 0, "breaks": 0, "failed": 0}, None]
    assert "compiled by step 2: 1 graphs, 0 recompilations, 0 graph breaks" in stream.getvalue()


# --- stochastic depth


def test_eager_draws_are_what_they_were():
    x = torch.randn(64, 3, 5)
    torch.manual_seed(3)
    expected = x * torch.empty(64, 1, 1).bernoulli_(1 - 0.3).div_(1 - 0.3)
    torch.manual_seed(3)
    assert torch.equal(DropPath(0.3)(x), expected)


def test_compiled_draws_have_the_rate_and_keep_the_mean():
    torch.manual_seed(0)
    drop = torch.compile(DropPath(0.25), backend="aot_eager", fullgraph=True, dynamic=False)
    out = drop(torch.ones(4000, 1))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)  # 4 deviations
    drop.eval()
    assert torch.equal(drop(torch.ones(3, 1)), torch.ones(3, 1))


def test_the_share_survives_meta_and_dtypes_and_stays_out_of_checkpoints():
    with torch.device("meta"):
        made = nn.Sequential(DropPath(0.25), DropPath(0.0))
    made.to_empty(device="cpu")
    made[0].share.fill_(9.0)
    assert made.to_empty(device="cpu")[0].share == 0.75
    assert made.to(torch.bfloat16)[0].share == 0.75
    assert made[1].share is None and made.state_dict() == {}
    x = torch.ones(2, 3)
    assert made[1](x) is x  # no drop, no cost


# --- when blocks are compiled


def test_auto_compiles_on_a_gpu_that_has_what_it_takes(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(compiled, "WHY_MISSING", None)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/gcc")
    assert why_not_compiled(gpu) is None and "GPU" in why_not_compiled(cpu)
    assert resolve_compile(SpeedConfig(), gpu) == (SpeedConfig(compile=True), [])
    assert resolve_compile(SpeedConfig(), cpu) == (SpeedConfig(compile=False), [])
    for asked in (True, False):
        speed = SpeedConfig(compile=asked)
        assert resolve_compile(speed, gpu) == resolve_compile(speed, cpu) == (speed, [])

    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    speed, (note,) = resolve_compile(SpeedConfig(), gpu)
    assert speed.compile is False and note == (
        "note: blocks are not compiled: Triton needs a C compiler (gcc or clang), which is not there"
    )
    monkeypatch.setenv("CC", "icc")
    assert "Triton needs the C compiler CC=icc" in why_not_compiled(gpu)
    monkeypatch.setattr(compiled, "WHY_MISSING", "the package triton cannot be imported: no")
    assert why_not_compiled(gpu) == "the package triton cannot be imported: no"
    with pytest.raises(InputError, match="--cuda-graphs needs compiled blocks, .*triton cannot be imported"):
        resolve_compile(SpeedConfig(cuda_graphs=True), gpu)
    with pytest.raises(InputError, match="--recompute budget needs compiled blocks"):
        resolve_compile(SpeedConfig(recompute="budget"), cpu)


def test_both_ways_to_recompute_are_the_compilers_settings():
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    found = {}
    for recompute in ("on", "off", "budget"):
        compiled.set_compiler(recompute)
        found[recompute] = functorch.cse, functorch.activation_memory_budget
    assert found == {"on": (False, 1.0), "off": (True, 1.0), "budget": (True, compiled.MEMORY_BUDGET)}
    assert dynamo.optimize_ddp is False


def test_flags_and_files_say_yes_no_or_nothing(tmp_path):
    def asked(*words):
        args = build_parser("pretrain").parse_args(["pretrain", "--data", "a", "--output", "b", *words])
        return configs_from_args(args)[1].speed

    assert [asked(*words).compile for words in ([], ["--compile"], ["--no-compile"])] == [None, True, False]
    for text, value in (("false", False), ("true", True), ("null", None)):
        (tmp_path / "a.yaml").write_text(f"compile: {text}\nrecompute: off\n")
        speed = asked("--config", str(tmp_path / "a.yaml"))
        assert (speed.compile, speed.recompute) == (value, "off")
    (tmp_path / "a.yaml").write_text("compile: maybe\n")
    with pytest.raises(InputError, match="compile must be true or false, not 'maybe'"):
        asked("--config", str(tmp_path / "a.yaml"))


def test_what_torch_is_asked_for_random_numbers():
    """Dropout draws as without torch.compile. A block that runs again whole gets no budget: its draws in the
    backward would be others than in the forward (seen with torch 2.13)."""
    import torch._functorch.config
    import torch._inductor.config

    for drop, checkpointing, budget in ((0.2, "full", 1.0), (0.0, "none", compiled.MEMORY_BUDGET)):
        blocks = build_blocks(DEEP, 48, 1, 3, drop=drop)
        prepare_blocks(blocks, checkpointing=checkpointing, compiled=True, recompute="budget")
        assert torch._functorch.config.activation_memory_budget == budget
        assert torch._inductor.config.fallback_random == bool(drop)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"checkpointing": "full"}, {"recompute": "budget"}])
def test_compiled_dropout_draws_what_it_draws_uncompiled(options, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")

    def outputs(**options):
        torch.manual_seed(0)
        blocks = build_blocks(DEEP.replace(drop_path_rate=0.0), 48, 2, 3, drop=0.2, attn_drop=0.3)
        prepare_blocks(blocks, **options)
        torch.manual_seed(1)
        x = torch.randn(2, 8, 48)
        for block in blocks:
            x = block(x)
        x.backward(torch.ones_like(x))
        return [x, *(parameter.grad for parameter in blocks.parameters())]

    plain = outputs()
    for one, other in zip(plain, outputs(compiled=True, **options)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_gradients_of_a_block_that_runs_again_whole_are_of_its_own_draws(monkeypatch):
    """Stochastic depth, compiled: the same numbers whether the block runs again or not."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")

    def gradients(checkpointing):
        torch.compiler.reset()
        torch.manual_seed(0)
        blocks = build_blocks(DEEP, 48, 2, 3)
        prepare_blocks(blocks, checkpointing=checkpointing, compiled=True, recompute="budget")
        torch.manual_seed(1)
        x = torch.randn(8, 8, 48)
        for block in blocks:
            x = block(x)
        x.backward(torch.ones_like(x))
        return [parameter.grad for parameter in blocks.parameters()]

    for one, other in zip(gradients("none"), gradients("full")):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
