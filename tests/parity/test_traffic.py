"""The bytes that a plan foretells are those that Megatron's collectives are given, on real gloo ranks."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest

from megacpp_stp.plan import build_plan
from megacpp_stp.plan.context_traffic import widths
from megacpp_stp.plan.traffic import flows
from megacpp_stp.recipe import load_recipe
from tests.parity._gloo import Layout, run_ranks
from tests.parity.nam import ALL_LETTERS, NO_EXPERTS, Training

pytestmark = [pytest.mark.slow]
HIDDEN = 64
ONE = ("parallel.pipeline=1", "parallel.stages=[12]", "launch.processes_per_node=2")
TENSOR = (*ONE, "parallel.tensor=2")
SEQUENCE = (*TENSOR, "parallel.sequence_parallel=true")
LETTERS = (*ALL_LETTERS, "model.mtp=null")


def counted(overrides: tuple[str, ...]) -> dict[str, int]:
    """Bytes that one step of this rank hands to each collective, of tensors whose last size is the hidden size or that
    are flat buffers.
    """
    import torch.distributed as dist

    training, found = Training(overrides), Counter()

    def size(value: Any) -> int:
        tensors = value if isinstance(value, list | tuple) else [value]
        shapes = [tensor.shape for tensor in tensors]
        wanted = all(shape[-1] == HIDDEN for shape in shapes if shape) or all(len(shape) == 1 for shape in shapes)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) if wanted else 0

    def replace(real: Any, other: Any) -> Any:
        """Where Megatron looks it up; nowhere else, since others call through to it."""
        for name, module in list(sys.modules.items()):
            if module is dist or name.startswith("megatron."):
                for attribute, value in list(vars(module).items()):
                    if value is real:
                        setattr(module, attribute, other)
        return other

    def watch(name: str, place: int, kind: str) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            value = args[place] if args else options["tensor"]
            shape = (value[0] if isinstance(value, list) else value).shape
            found[kind if len(shape) > 1 else f"{kind} of a buffer"] += size(value)
            return real(*args, **options)

        return replace(real, call)

    watch("all_gather_into_tensor", 0, "all-gather")
    watch("all_gather", 0, "all-gather in parts")
    watch("reduce_scatter_tensor", 1, "reduce-scatter")
    watch("all_reduce", 0, "all-reduce")
    watch("all_to_all_single", 1, "all-to-all")
    real_send, real_pair = dist.isend, dist.P2POp
    send = watch("isend", 0, "send")

    def pair(op: Any, tensor: Any, *args: Any, **options: Any) -> Any:
        if op is send:
            found["send"] += size(tensor)
        return real_pair(real_send if op is send else op, tensor, *args, **options)

    replace(real_pair, pair)
    training.step(0)
    return dict(found)


def foretold(overrides):
    plan = build_plan(load_recipe("nam56r-tiny", overrides), device="cpu")
    return {(flow.operation, flow.what): flow.payload for flow in flows(plan)}


def ran(overrides, layout, world=2):
    return run_ranks(counted, world, overrides, layout=layout, timeout=300)


def test_attention_and_mlps_gather_and_scatter_under_sequence_parallelism():
    settings = (*NO_EXPERTS, *SEQUENCE, "model.pattern=A", "model.families.M=null", "model.families.R=null")
    planned = foretold(settings)
    for found in ran(settings, Layout(tensor=2)):
        assert found["all-gather"] == planned["all-gather", "hidden states"]
        assert found["reduce-scatter"] == planned["reduce-scatter", "hidden states"]


def test_every_letter_does():
    settings = (*LETTERS, *SEQUENCE)
    planned = foretold(settings)
    for found in ran(settings, Layout(tensor=2)):
        assert found["all-gather"] == planned["all-gather", "hidden states"]
        assert found["reduce-scatter"] == planned["reduce-scatter", "hidden states"]
        assert found["all-gather in parts"] == planned["all-gather", "tokens of an expert"]


def test_tensor_parallelism_alone_reduces():
    settings = (*NO_EXPERTS, *TENSOR)
    planned = foretold(settings)
    for found in ran(settings, Layout(tensor=2)):
        assert found["all-reduce"] == planned["all-reduce", "hidden states"]


def test_tokens_go_to_their_experts_and_back():
    """Whatever the routing, over all ranks together."""
    settings = (*LETTERS, *ONE, "parallel.expert=2")
    found = ran(settings, Layout(expert=2))
    planned = foretold(settings)
    assert sum(one["all-to-all"] for one in found) == 2 * planned["all-to-all", "tokens to their experts and back"]


def test_all_tokens_are_gathered_by_the_other_dispatcher():
    settings = (*LETTERS, *ONE, "parallel.expert=2", "model.families.E.dispatcher=allgather")
    planned = foretold(settings)
    for found in ran(settings, Layout(expert=2)):
        for how in ("all-gather", "reduce-scatter"):
            assert found[how] == planned[how, "tokens of all experts"]


def exchanged(heads: int, head_dim: int, state: int, groups: int, tokens: int) -> int:
    """Bytes that Megatron's Mamba-2 hands to all-to-alls in both passes of one layer."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.ssm.mamba_context_parallel import MambaContextParallel

    real, found = dist.all_to_all_single, []

    def call(output: Any, value: Any, *args: Any, **options: Any) -> Any:
        found.append(value.numel() * value.element_size())
        return real(output, value, *args, **options)

    dist.all_to_all_single = call
    inner, group = heads * head_dim, parallel_state.get_context_parallel_group()
    weights = dict.fromkeys(("conv1d_weight_cp1", "conv1d_bias_cp1", "dt_bias_cp1", "A_log_cp1", "D_cp1"))
    layer = MambaContextParallel(group, inner, heads, groups, state, conv1d_padding=3, D_has_hdim=False, **weights)
    projected = torch.randn(tokens // 2, 1, 2 * inner + 2 * groups * state + heads, requires_grad=True)
    mixed = layer.pre_conv_ssm(projected)[..., : inner // 2]
    layer.post_conv_ssm(mixed).sum().backward()
    assert projected.grad is not None
    return sum(found)


@pytest.mark.parametrize("groups", [1, 4])
def test_mamba2_exchanges_its_channels_for_heads_under_context_parallelism(groups):
    """Fewer groups than ranks are repeated."""
    block = f"model.families.M={{block: mamba2, heads: 8, head_dim: 32, state_dim: 24, groups: {groups}}}"
    recipe = load_recipe("nam56r-tiny", (block, "parallel.context=2", "launch.processes_per_node=4"))
    tokens = 16
    planned = widths(recipe, "mamba2").exchanged * tokens // 2 * 4
    assert run_ranks(exchanged, 2, 8, 32, 24, groups, tokens, layout=Layout(context=2), timeout=120) == [planned] * 2


@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_and_weights(distributed):
    settings = (*NO_EXPERTS, *ONE, f"optimizer.distributed={str(distributed).lower()}")
    planned = foretold(settings)
    for found in ran(settings, Layout()):
        if not distributed:
            assert found["all-reduce of a buffer"] == pytest.approx(planned["all-reduce", "gradients"], abs=64)
            continue
        # Buckets are padded.
        assert found["reduce-scatter of a buffer"] == pytest.approx(planned["reduce-scatter", "gradients"], rel=0.01)
        assert found["all-gather of a buffer"] == pytest.approx(planned["all-gather", "weights"], rel=0.01)


@pytest.mark.parametrize("virtual", [1, 2])
def test_hidden_states_and_their_gradients_go_through_the_pipeline(virtual):
    stages = {1: "[6, 6]", 2: "[3, 3, 3, 3]"}[virtual]
    settings = (*NO_EXPERTS, f"parallel.virtual={virtual}", f"parallel.stages={stages}")
    found = ran(settings, Layout(pipeline=2, virtual=virtual if virtual > 1 else None))
    assert max(one["send"] for one in found) == foretold(settings)["send", "hidden states and their gradients"]
