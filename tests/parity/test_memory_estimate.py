"""The memory estimate against Megatron: what autograd saves, what DDP and Adam allocate, how many are in flight.

And what the passes of sparse attention take. Activations are compared where a CPU has a fused attention kernel.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest

from megacpp_stp.plan import build_plan
from megacpp_stp.plan.activations import kept_by, passing
from megacpp_stp.plan.argv import emit
from megacpp_stp.plan.cost import cost_of
from megacpp_stp.plan.footprint import footprints
from megacpp_stp.plan.mixer_activations import MAMBA3_CHUNKS_IN_SPAN
from megacpp_stp.plan.parameters import parts
from megacpp_stp.plan.schedule import peak_in_flight
from megacpp_stp.recipe import load_recipe
from tests.parity._gloo import Layout, run_ranks
from tests.parity.test_parameter_count import M2RNN, MAMBA3, PREDICTION, SPARSE, lowered, parsed
from tests.recipes import STAND_INS

COMMON = (
    "parallel.pipeline=1",
    "parallel.stages=[12]",
    "launch.processes_per_node=1",
    "model.families.A.v_head_dim=48",  # as wide as the keys, else a CPU keeps all scores
)
MULTI_HEAD = "model.families.A={block: attention, head_dim: 32, kv_groups: 4, dense_mlp: false}"
BF16 = (*COMMON, "training.precision=bf16")


def again(*modules: str) -> str:
    return f"training.recompute={{granularity: selective, modules: [{', '.join(modules)}]}}"


FULL = "training.recompute={granularity: full, modules: []}"
VARIANTS = {
    "fp32": COMMON,
    "bf16": (*COMMON, "training.precision=bf16"),
    "bf16 swiglu": (*COMMON, "training.precision=bf16", "model.activation=swiglu"),
    "bf16 gelu": (*COMMON, "training.precision=bf16", "model.activation=gelu"),
    "bf16 attention": (*COMMON[:3], "training.precision=bf16", MULTI_HEAD),
    "fp32 sparse": (*COMMON, SPARSE),
    "bf16 sparse": (*BF16, SPARSE),
    "bf16 sparse, indexer without loss": (*BF16, SPARSE.replace("0.01", "0")),
    "fp32 mamba3": (*COMMON, MAMBA3),
    "bf16 mamba3": (*BF16, MAMBA3),
    "bf16 mamba3, rotated": (*BF16, MAMBA3.replace("false", "true")),
    "bf16 mamba3, several inputs": (*BF16, MAMBA3.replace("mimo_rank: 1", "mimo_rank: 4")),
    "fp32 m2rnn": (*COMMON, M2RNN),
    "bf16 m2rnn": (*BF16, M2RNN),
    "bf16 prediction": (*BF16, PREDICTION),
    "fp32 prediction": (*COMMON, PREDICTION),
    "core_attn again": (*BF16, again("core_attn"), SPARSE),
    "layernorm again": (*BF16, again("layernorm"), SPARSE),
    "mla_up_proj again": (*BF16, again("mla_up_proj"), SPARSE),
    "both parts of attention again": (*BF16, again("core_attn", "mla_up_proj"), SPARSE),
    "mlp again": (*BF16, again("mlp")),
    "moe again": (*BF16, again("moe"), PREDICTION),
    "shared_experts again": (*BF16, again("shared_experts")),
    "much again": (*BF16, again("layernorm", "mla_up_proj", "mlp", "moe"), PREDICTION),
    "full": (*BF16, FULL, SPARSE, MAMBA3, PREDICTION),
}


def saved(cases: list[tuple[list[str], int, int, int]]) -> list[Any]:
    """Bytes that autograd keeps, by part, each storage once and parameters not at all."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    _without_fp8()
    groups, found = ProcessGroupCollection.use_mpu_process_groups(), []
    for argv, vocab_size, sequence, batch in cases:
        config = parsed(argv, vocab_size)
        model = config.get_builder_cls()(config).build_model(groups, pre_process=True, post_process=True)
        model = model.to(config.transformer.params_dtype)
        tokens = torch.randint(0, vocab_size, (batch, sequence + 1))
        positions = torch.arange(sequence).expand(batch, sequence)
        with Recorded(model) as bytes_of:
            model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
        found.append(bytes_of.counts)
    return found


def _without_fp8() -> None:
    """What Transformer Engine would say of fp8: upstream asks it in layers that norm again, and fails without it."""
    from contextlib import nullcontext

    from megatron.core.tensor_parallel import random

    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = lambda **_: nullcontext()


class Recorded:
    """Bytes that are alive for the backward pass, under the part whose forward pass is running when they are saved.

    A checkpoint keeps its inputs in Python and not in autograd, and frees what it computes again; so bytes are taken at
    the end, and what only Python holds then is counted too, as ``elsewhere``.
    """

    def __init__(self, model: Any) -> None:
        self.counts: Counter[str] = Counter()
        self._seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._kept: list[Any] = []  # a freed storage's identity would be used again
        self._part = "embedding"
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(self._enter(f"layer {layer.layer_number}"))
        model.decoder.final_norm.register_forward_pre_hook(self._enter("output"))
        # The depths run between the final norm and the output layer, which computes all logits: one part.
        for number, depth in enumerate(model.mtp.layers if hasattr(model, "mtp") else (), start=1):
            depth.register_forward_pre_hook(self._enter("output"))
            for layer in depth.mtp_model_layer.layers:
                layer.register_forward_pre_hook(self._enter(f"mtp {number} layer {layer.layer_number}"))
            depth.final_layernorm.register_forward_pre_hook(self._enter("output"))

    def __enter__(self) -> Recorded:
        import torch

        self._before = {id(tensor) for tensor in _tensors_of_python()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for part, storage in tuple(self._kept):
            self.counts[part] += storage.nbytes()
        for tensor in _tensors_of_python():
            storage = tensor.untyped_storage()
            if id(tensor) not in self._before and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self._kept.append((None, storage))
                self.counts["elsewhere"] += storage.nbytes()

    def _enter(self, part: str) -> Any:
        def enter(*_: object) -> None:
            self._part = part

        return enter

    def _pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append((self._part, storage))
        return tensor


def _tensors_of_python() -> list[Any]:
    import gc

    import torch

    gc.collect()
    return [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]


@pytest.fixture(scope="module")
def measured():
    cases, recipes = [], {name: load_recipe(STAND_INS, overrides) for name, overrides in VARIANTS.items()}
    for recipe in recipes.values():
        argv = [token for argument in emit(recipe, lowered(recipe), device="cpu") for token in argument.tokens]
        training = recipe.training
        cases.append((argv, recipe.model.vocab_size, training.sequence_length, training.micro_batch_size))
    return dict(zip(recipes, run_ranks(saved, 1, cases, timeout=300)[0], strict=True)), recipes


def estimated(recipe: Any) -> dict[str, int]:
    """Bytes by part; of multi-token prediction what is no layer is with the output."""
    tokens = recipe.training.sequence_length * recipe.training.micro_batch_size
    found: Counter[str] = Counter()
    for part in parts(recipe, lowered(recipe)):
        kept = sum(kept_by(recipe, part).on_gpu(recipe.parallel).values())
        # The logits in the compute dtype are alive but not autograd's.
        hidden = recipe.model.vocab_size * 2 if part.kind == "output" and recipe.training.precision == "bf16" else 0
        found["output" if part.kind == "mtp" else part.name] += (kept - hidden) * tokens
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_the_estimate_is_what_autograd_keeps(measured, name):
    counts, recipe = measured[0][name], measured[1][name]
    estimate = estimated(recipe)
    # Two things can be compared in the sum alone: Mamba-3's spans, which are checkpoints whose inputs Python holds, and
    # what an attention layer without an MLP keeps for it, which is also the next layer's.
    alone = {part.name for part in parts(recipe, lowered(recipe)) if part.kind == "mamba3"}
    if name == "much again":
        alone = set(estimate)
    # Rotary tables and the norms' weights are left out of the estimate: a twentieth at these small sizes.
    for part in estimate.keys() - alone:
        assert estimate[part] == pytest.approx(counts[part], rel=0.05), part
    assert sum(estimate.values()) == pytest.approx(sum(counts.values()), rel=0.05)


def test_mamba3_keeps_a_state_as_often_as_is_counted():
    from megacpp_stp.model.mamba3.chunked import CHUNKS_IN_SPAN

    assert CHUNKS_IN_SPAN == MAMBA3_CHUNKS_IN_SPAN


def peak(work: Any) -> int:
    """Most bytes that are live at a time while `work` runs, without what lived before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def passed(cases: list[tuple[list[str], int, int, int]]) -> list[int]:
    """The peak of one sparse attention layer's two passes."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper

    _without_fp8()
    groups, found = ProcessGroupCollection.use_mpu_process_groups(), []
    for argv, vocab_size, sequence, batch in cases:
        config = parsed(argv, vocab_size)
        model = config.get_builder_cls()(config).build_model(groups, pre_process=True, post_process=True)
        layer = model.to(config.transformer.params_dtype).decoder.layers[0]
        shape = (sequence, batch, config.transformer.hidden_size)
        given, back = (torch.randn(shape, dtype=config.transformer.params_dtype) for _ in range(2))
        given.requires_grad_()
        # Upstream's log makes its tensor where a loss comes first, which may be within backward.
        DSAIndexerLossLoggingHelper.save_loss_to_tracker(torch.zeros(()), 1, config.transformer.num_layers)

        def passes(layer=layer, given=given, back=back) -> None:
            layer(given, attention_mask=None)[0].backward(back)

        passes()  # so that the weights' gradients are there before
        found.append(peak(passes))
    return found


def indexed(heads: int, indexer_heads: int, queries: int, keys: int) -> tuple[int, int, int]:
    """The peaks of an indexer without loss, and of its loss's two passes, over a shard of queries and all keys."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.experimental_attention_variant import dsa

    groups = ProcessGroupCollection.use_mpu_process_groups()
    query = torch.randn(queries, 1, indexer_heads, 8, requires_grad=True)
    weights, key = torch.randn(queries, 1, indexer_heads), torch.randn(keys, 1, 8)
    attention = torch.randn(queries, 1, heads, 8), torch.randn(keys, 1, 1, 8).expand(-1, -1, heads, -1)
    starts, ends, losses = torch.zeros(queries, dtype=torch.int64), torch.arange(1, queries + 1), []

    def alone() -> Any:
        with torch.no_grad():
            return dsa.fused_qk_topk_naive(query, key, weights, 4, varlen_starts=starts, varlen_ends=ends)

    def forward() -> None:
        given = (query, weights, key, *attention, 0.1, 4, 0.01, None, False, groups, starts, ends)
        losses.append(dsa.FusedDSAIndexerLoss.apply(*given)[1])

    return peak(alone), peak(forward), peak(lambda: losses[0].backward())


def sparse(*overrides: str, indexer_heads: int, loss: str) -> Any:
    sizes = f"indexer_heads: {indexer_heads}, indexer_head_dim: 24, topk: 16"
    block = f"{{ranks: [0, 2], {sizes}, kernel: upstream, loss: dense, loss_coeff: {loss}}}"
    return load_recipe(STAND_INS, (*COMMON, f"model.families.A.sparse={block}", *overrides))


def first_sparse(recipe: Any) -> Any:
    return next(part for part in parts(recipe, lowered(recipe)) if part.kind == "dsa")


SHIPPED = ("core_attn", "mla_up_proj")


@pytest.mark.parametrize(
    "modules",
    [pytest.param((), marks=pytest.mark.slow), pytest.param(("core_attn",), marks=pytest.mark.slow), SHIPPED],
    ids=str,
)
def test_the_passes_of_sparse_attention_take_what_is_estimated(modules):
    """With few indexer heads the attention is the peak, with many the indexer: its loss, or without one its scores."""
    cases, estimates = [], []
    for length, batch in ((256, 2), (512, 1)):
        for precision, heads, loss in (("fp32", 2, "0.01"), ("bf16", 2, "0"), ("bf16", 32, "0"), ("bf16", 32, "0.01")):
            sizes = (f"training.sequence_length={length}", f"training.micro_batch_size={batch}")
            others = (f"training.precision={precision}", *([again(*modules)] if modules else []))
            recipe = sparse(*sizes, *others, indexer_heads=heads, loss=loss)
            found = footprints(recipe, [first_sparse(recipe)])[0]
            estimates.append(found.microbatch + found.again)
            argv = [token for one in emit(recipe, lowered(recipe), device="cpu") for token in one.tokens]
            cases.append((argv, recipe.model.vocab_size, length, batch))
    measured = run_ranks(passed, 1, cases, timeout=300)[0]
    assert estimates == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("keys", [256, 1024])
@pytest.mark.parametrize(("heads", "indexer_heads"), [(16, 2), (2, 32)])
def test_the_indexer_and_its_loss_take_what_is_estimated_over_a_shard_of_queries(heads, indexer_heads, keys):
    alone, forward, backward = run_ranks(indexed, 1, heads, indexer_heads, 256, keys)[0]
    overrides = (f"model.heads={heads}", f"training.sequence_length={keys}")
    for loss, most in (("0", alone), ("0.01", max(forward, backward))):
        recipe = sparse(*overrides, indexer_heads=indexer_heads, loss=loss)
        estimate = passing(recipe, first_sparse(recipe)).on_gpu(recipe.parallel)[1]
        assert 256 * estimate == pytest.approx(most, rel=0.03)


def allocated(cases: list[tuple[list[str], int]]) -> list[dict[str, int]]:
    """Bytes of weights, DDP's gradient buffers, and Adam's state after a step."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups, found = ProcessGroupCollection.use_mpu_process_groups(), []
    for argv, vocab_size in cases:
        config = parsed(argv, vocab_size)
        is_bf16, sharded = config.transformer.bf16, "--use-distributed-optimizer" in argv
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=is_bf16, use_distributed_optimizer=sharded)
        builder = config.get_builder_cls()(config)
        chunks = builder.build_distributed_models(groups, ddp_config=ddp)
        settings = OptimizerConfig(optimizer="adam", lr=0.1, bf16=is_bf16, use_distributed_optimizer=sharded)
        optimizer = get_megatron_optimizer(settings, chunks)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.step()
        buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
        inner = [one.optimizer for one in optimizer.chained_optimizers]
        moments = [v for one in inner for s in one.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
        stepped = {id(p): p for one in inner for group in one.param_groups for p in group["params"]}
        own = {weight.data_ptr() for weight in weights}
        copies = [parameter for parameter in stepped.values() if parameter.data_ptr() not in own]
        found.append(
            {
                "weights": sum(map(size, weights)),
                "gradients": sum(size(buffer.grad_data) for buffer in buffers),
                "optimizer state": sum(map(size, [*moments, *copies])),
            }
        )
    return found


def size(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def test_what_is_called_exact_is_what_megatron_allocates():
    layout = Layout(pipeline=2)
    overrides = [(f"training.precision={name}", *more) for name in ("fp32", "bf16") for more in ((), (PREDICTION,))]
    plans = [build_plan(load_recipe(STAND_INS, chosen), device="cpu") for chosen in overrides]
    cases = [(plan.argv, plan.recipe.model.vocab_size) for plan in plans]
    for rank, results in enumerate(run_ranks(allocated, 2, cases, layout=layout, timeout=300)):
        for plan, result in zip(plans, results, strict=True):
            rows = {row.name: row.bytes for row in cost_of(plan).ranks[rank].rows if row.exact}
            assert rows == result


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_the_distributed_optimizer_is_cut_as_estimated(precision):
    overrides = (*COMMON[:2], "launch.processes_per_node=2", "optimizer.distributed=true")
    plan = build_plan(load_recipe(STAND_INS, (*overrides, f"training.precision={precision}")), device="cpu")
    rows = {row.name: row.bytes for row in cost_of(plan).ranks[0].rows}
    both = [result[0] for result in run_ranks(allocated, 2, [(plan.argv, plan.recipe.model.vocab_size)])]
    for result in both:
        for name in ("weights", "gradients"):
            assert result[name] == pytest.approx(rows[name], rel=0.01), name
    # The cut is even over all ranks' buckets together, and not on each rank.
    mean = sum(result["optimizer state"] for result in both) / 2
    assert mean == pytest.approx(rows["optimizer state"], rel=0.01)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_without_virtual_stages_1f1b_holds_what_is_behind(pipeline, micro_batches):
    for rank in range(pipeline):
        peak, held = peak_in_flight([5], rank=rank, pipeline=pipeline, micro_batches=micro_batches)
        assert held == (min(pipeline - rank, micro_batches),)
        assert peak == 5 * held[0]


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"),
    [(2, 2, 4), (4, 2, 8), (4, 3, 4), (3, 2, 9), (2, 4, 64), (4, 2, 60), (3, 3, 30)],
)
def test_with_virtual_stages_it_is_megatrons_schedule(pipeline, virtual, micro_batches):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    costs = [7**stage for stage in range(virtual)]
    table = [chunk for _, chunk in get_schedule_table(micro_batches, virtual, pipeline)]
    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        total, _, warmup, remaining = get_pp_rank_microbatches(
            micro_batches, virtual, pipeline, p2p_communicator=communicator
        )
        # One number a moment: +cost at a forward pass, -cost at a backward pass.
        moments = [costs[chunk] for chunk in table[:warmup]]
        for step in range(remaining):
            moments += [costs[table[warmup + step]], -costs[virtual - 1 - table[step]]]
        held = [sum(moments[: moment + 1]) for moment in range(len(moments))]
        peak, in_flight = peak_in_flight(costs, rank=rank, pipeline=pipeline, micro_batches=micro_batches)
        assert peak == max(held)
        assert sum(number * cost for number, cost in zip(in_flight, costs, strict=True)) == peak
        assert total == micro_batches * virtual
