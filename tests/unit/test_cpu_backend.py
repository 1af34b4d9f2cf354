"""The CPU backend: what it redirects, that it leaves no trace, and that `pretrain()` needs and survives it.

Run as a module under torchrun, this file is one rank of such a `pretrain()`: the tests at the end start it.
"""

from __future__ import annotations

import importlib
import json
import math
import mmap
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.training import cpu_backend
from megacpp_stp.training.cpu_backend import REDIRECTS, CpuBackend, Redirect, install

ATTRIBUTES = [redirect.target for redirect in REDIRECTS if ":" in redirect.target]


@pytest.fixture
def installable(monkeypatch):
    """A process in which `install` may be called, whatever tests on a GPU did before."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


@pytest.fixture
def backend(installable):
    with install() as installed:
        yield installed


def look_up(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


# --- installing and undoing -------------------------------------------------------------------------


def test_undo_restores_every_object_by_identity(installable):
    before = {target: look_up(target) for target in ATTRIBUTES}
    backend = install()
    assert all(look_up(target) is not before[target] for target in ATTRIBUTES)
    backend.undo()
    assert all(look_up(target) is before[target] for target in ATTRIBUTES)
    assert torch.overrides._get_current_function_mode() is None
    backend.undo()


def test_a_second_install_is_refused_until_the_first_is_undone(backend):
    with pytest.raises(RuntimeError, match="installed already"):
        install()
    backend.undo()
    with install():
        pass


def test_a_failed_install_leaves_nothing_behind(installable, monkeypatch):
    before = {target: look_up(target) for target in ATTRIBUTES}
    broken = Redirect(target="no.such.module:thing", answer=lambda: None, sites=(), why="")
    monkeypatch.setattr(cpu_backend, "REDIRECTS", (*REDIRECTS, broken))
    with pytest.raises(ModuleNotFoundError):
        install()
    assert all(look_up(target) is before[target] for target in ATTRIBUTES)
    assert torch.overrides._get_current_function_mode() is None


def test_undo_under_a_younger_function_mode_is_refused(backend):
    class Younger(torch.overrides.TorchFunctionMode):
        pass

    with Younger(), pytest.raises(RuntimeError, match="function modes"):
        backend.undo()


def test_a_process_that_uses_cuda_is_refused(installable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUDA is in use"):
        install()


@pytest.mark.parametrize("value", [None, "0"])
def test_torch_compile_must_be_off(installable, monkeypatch, value):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", value)
    with pytest.raises(UserError) as caught:
        install()
    assert caught.value.field == "TORCHDYNAMO_DISABLE"


# --- what the redirects answer ------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda"), torch.device("cuda", 1)])
def test_a_cuda_device_argument_means_the_cpu(backend, device):
    assert torch.ones(2, device=device).device.type == "cpu"
    assert torch.tensor([1.0], device=device).device.type == "cpu"
    assert torch.ones(2).to(device=device).device.type == "cpu"
    assert backend.hits["device="] == 3


@pytest.mark.parametrize("device", ["cpu", "meta", None])
def test_other_device_arguments_pass_unchanged(backend, device):
    assert torch.ones(2, device=device).device.type == (device or "cpu")
    assert backend.hits["device="] == 0


def test_moving_to_the_gpu_keeps_the_object(backend):
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    weight = module.weight
    assert tensor.cuda() is tensor
    assert module.cuda(torch.cuda.current_device()).weight is weight


def test_tensor_types_read_as_on_cuda_and_conversions_still_convert(backend):
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_torch_itself_is_told_nothing_new(installable):
    before = torch.cuda.is_available(), torch.accelerator.is_available()
    with install():
        assert (torch.cuda.is_available(), torch.accelerator.is_available()) == before
        assert not torch.ones(1).is_cuda


def test_streams_and_their_events_never_wait(backend):
    stream = torch.cuda.Stream()
    assert isinstance(stream, torch.cuda.Stream)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
    stream.record_event().synchronize()
    assert (backend.hits["torch.cuda:Stream"], backend.hits["torch.cuda:current_stream"]) == (1, 1)


def test_tracked_random_streams_are_separate_and_leave_the_default_one_alone(backend):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(5)
    tracker.add("one", 1)
    tracker.add("two", 2)
    default = torch.get_rng_state()
    draws = {}
    for name in ("one", "two"):
        with tracker.fork(name):
            draws[name] = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), default)
    for name, seed in (("one", 1), ("two", 2)):
        assert torch.equal(draws[name], torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    with tracker.fork("one"):
        assert not torch.equal(torch.rand(4), draws["one"])


def test_a_saved_random_state_comes_back(backend):
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_memory_statistics_are_those_of_the_process(backend):
    size = 64 << 20
    before = torch.cuda.memory_allocated()
    # Pages of its own: a tensor may lie in pages that earlier tests freed and the allocator kept resident.
    with mmap.mmap(-1, size) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        grown = torch.cuda.memory_allocated()
        assert size * 0.9 < grown - before < size * 2
        assert torch.cuda.max_memory_allocated() >= grown
        assert torch.cuda.memory_stats()["reserved_bytes.all.current"] >= grown
    assert size * 0.9 < grown - torch.cuda.memory_allocated()
    assert math.isnan(torch.cuda.memory_stats()["allocation.all.current"])


def test_split_sizes_become_numpy_and_tensors_stay(backend):
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    sizes = torch.tensor([3, 4])
    assert maybe_move_tensor_to_cpu(sizes, as_numpy=True).tolist() == [3, 4]
    assert maybe_move_tensor_to_cpu(sizes, as_numpy=True).__class__.__module__ == "numpy"
    assert maybe_move_tensor_to_cpu(sizes) is sizes
    assert maybe_move_tensor_to_cpu(7, as_numpy=True) == 7


def test_a_layer_recomputed_in_a_recomputed_layer_is_told_the_same(backend):
    from megatron.core.pipeline_parallel.schedules import custom_backward
    from megatron.core.tensor_parallel.random import checkpoint

    calls: list[torch.Tensor] = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.full((), 3.0, device="cuda"))
        return x * calls[-1]

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(lambda x: checkpoint(inner, False, x) ** 2, False, x)
    custom_backward(y.sum(), None)
    assert x.grad.tolist() == [18.0, 18.0] and len(calls) == 3


@pytest.mark.parametrize("redirect", REDIRECTS, ids=lambda redirect: redirect.target)
def test_the_named_sites_exist_upstream(redirect):
    """A site that upstream renamed or removed takes its reason with it."""
    root = Path(find_spec("megatron.core").origin).parents[1]
    assert redirect.sites
    for site in redirect.sites:
        file, function = site.split(":")
        assert f"def {function.rpartition('.')[2]}(" in (root / file).read_text(encoding="utf-8"), site


# --- pretrain() on two gloo processes -------------------------------------------------------------------


ARGUMENTS = shlex.split("""
    --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --multi-latent-attention --q-lora-rank 32 --kv-lora-rank 32 --qk-head-dim 16 --qk-pos-emb-head-dim 8
    --v-head-dim 24 --qk-layernorm --position-embedding-type rope --normalization RMSNorm --disable-bias-linear
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-aux-loss-coeff 1e-2
    --moe-router-load-balancing-type aux_loss --moe-token-dispatcher-type alltoall
    --transformer-impl local --spec megacpp_stp.model.specs nam_torch_stack_spec --distributed-backend gloo
    --no-gradient-accumulation-fusion --no-rope-fusion --untie-embeddings-and-output-weights
    --micro-batch-size 1 --global-batch-size 4 --train-iters 5 --lr 1e-3 --lr-decay-style constant
    --log-interval 1 --eval-interval 3 --eval-iters 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --num-workers 0 --no-create-attention-mask-in-dataloader --hidden-dropout 0 --attention-dropout 0.1
""")


class Run:
    """A finished `pretrain()`: what rank by rank was asked of the redirects, and what the log says."""

    def __init__(self, directory: Path, arguments: str) -> None:
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "HITS_DIRECTORY": str(directory),
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "-m", __name__, *ARGUMENTS, *arguments.split()]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=180)
        self.log = done.stdout
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        self.hits = [json.loads((directory / f"hits{rank}.json").read_text()) for rank in range(2)]

    def logged(self, what: str) -> dict[int, float]:
        """The value of `what` at each iteration."""
        found = re.findall(rf"iteration +(\d+)/.*?\| {what}: ([0-9.E+naif-]+) \|", self.log)
        return {int(iteration): float(value) for iteration, value in found}

    def asked(self, target: str) -> bool:
        return any(hits.get(target, 0) > 0 for hits in self.hits)


@pytest.fixture(scope="module")
def pipeline_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pipeline")
    arguments = f"--hybrid-layer-pattern +E-|+E- --pipeline-model-parallel-size 2 --save {directory / 'checkpoint'}"
    return Run(directory, f"{arguments} --save-interval 3 --use-cpu-initialization")


@pytest.fixture(scope="module")
def tensor_run(tmp_path_factory):
    arguments = "--hybrid-layer-pattern +E- --tensor-model-parallel-size 2 --sequence-parallel"
    return Run(
        tmp_path_factory.mktemp("tensor"),
        f"{arguments} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--bf16 --use-distributed-optimizer --recompute-granularity selective --recompute-modules moe",
    )


def test_pretrain_learns_evaluates_and_saves_over_two_pipeline_stages(pipeline_run):
    losses, norms = pipeline_run.logged("lm loss"), pipeline_run.logged("grad norm")
    assert sorted(losses) == sorted(norms) == [1, 2, 3, 4, 5]
    assert losses[1] == pytest.approx(math.log(128), abs=0.1)
    assert losses[5] < losses[1] - 0.3
    assert all(0 < norm < 10 for norm in norms.values())
    assert all(value > 0 for value in pipeline_run.logged("load_balancing_loss").values())
    assert "validation loss at iteration 3" in pipeline_run.log
    assert "successfully saved checkpoint from iteration       5" in pipeline_run.log


@pytest.mark.parametrize("target", [r.target for r in REDIRECTS if r.feature == "training"])
def test_training_asks_for_every_redirect_that_claims_it(pipeline_run, target):
    assert pipeline_run.asked(target)


def test_a_resumed_run_goes_on_exactly(pipeline_run, tmp_path_factory):
    """Same loss and gradient as the run that was never stopped, dropout included: the random streams came back."""
    saved = Path(re.search(r"saved checkpoint from iteration +3 to (\S+)", pipeline_run.log).group(1))
    arguments = f"--hybrid-layer-pattern +E-|+E- --pipeline-model-parallel-size 2 --load {saved} --ckpt-step 3"
    run = Run(tmp_path_factory.mktemp("resumed"), f"{arguments} --use-cpu-initialization")
    for what in ("lm loss", "grad norm", "load_balancing_loss"):
        assert run.logged(what)[4] == pipeline_run.logged(what)[4]
    # Upstream averages the first two losses that it logs after a load, but not the gradient norms.
    assert run.logged("grad norm")[5] == pipeline_run.logged("grad norm")[5]
    assert run.asked("torch.cuda:set_rng_state")


def test_tensor_and_expert_parallelism_with_recomputation_ask_for_the_rest(pipeline_run, tensor_run):
    assert tensor_run.logged("lm loss")[5] < tensor_run.logged("lm loss")[1]
    for redirect in REDIRECTS:
        if redirect.feature not in ("training", "resuming from a checkpoint"):
            assert tensor_run.asked(redirect.target), redirect.target
            assert pipeline_run.asked(redirect.target) is (redirect.feature.startswith("expert")), redirect.target


# --- one rank ---------------------------------------------------------------------------------------------


def train() -> None:
    backend = install()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megacpp_stp.patches.registry import Registry

    Registry.load().activate({"patches": ["dataset-helpers"]})
    args = parse_and_validate_args()
    datasets.is_distributed = True
    config = pretrain_cfg_container_from_args(args, hybrid_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    write_hits(backend)


def write_hits(backend: CpuBackend) -> None:
    path = Path(os.environ["HITS_DIRECTORY"]) / f"hits{os.environ['RANK']}.json"
    path.write_text(json.dumps(backend.hits))


def datasets(samples: list[int], vp_stage: int | None = None) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="1,1,1",
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, config).build()


def forward_step(iterator: Any, model: Any) -> Any:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(masked_loss, batch["loss_mask"])


def masked_loss(mask: Any, losses: Any) -> Any:
    total, count = (losses.float() * mask).sum(), mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.detach()])}


if __name__ == "__main__":
    train()
