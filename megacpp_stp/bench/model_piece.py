"""One piece of a model in a process of its own: built from a recipe as a run builds it, timed, and weighed.

A layer is a pipeline stage of that one layer, between the first and the last: hidden states in and out. The head is a
stage that is both and has no layer. Around either are Megatron's own wrappers, so that parameters have the dtypes and
gradients the buffers of a run; the optimizer is left out.

Legend: s sequence, b batch, h hidden.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacpp_stp.bench.model_recipe import HEAD
from megacpp_stp.bench.peak import CpuPeak, GpuPeak
from megacpp_stp.bench.world import one_process_world
from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan, build_plan
from megacpp_stp.recipe.load import restore_recipe

REFUSED = "megacpp-stp: refused: "
"""What stands before a mistake that the user can mend; it is the end of stderr."""

_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
_OWN_MAPPING = 128 * 2**10
"""Bytes from which a tensor has pages of its own, so that a process's size is that of its tensors."""


def main(arguments: str) -> int:
    """Measure one piece and print what was found as one line of JSON.

    Args:
        arguments: As JSON: ``recipe`` (of the piece), ``piece``, ``device``, ``warm_up``, ``repeats``, ``threads``.

    Returns:
        0, or 2 after a mistake that the user can mend.
    """
    settings = json.loads(arguments)
    try:
        plan = build_plan(restore_recipe(settings["recipe"]), device=settings["device"])
        found = _measure(plan, settings)
    except UserError as error:
        print(f"{REFUSED}{error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


def _measure(plan: RunPlan, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from megacpp_stp.patches.registry import Registry

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    with Registry.load().activate(plan.as_dict()) as patches, one_process_world(plan.device):
        wrapped, run = _build(plan, patches, head=settings["piece"] == HEAD)
        clock = _gpu_seconds if plan.device == "cuda" else _cpu_seconds
        for _ in range(settings["warm_up"]):
            run()
        seconds = [clock(run) for _ in range(settings["repeats"])]
        parameters = list(wrapped.parameters())
        return {
            "seconds": seconds,
            "peak_bytes": _peak_bytes(run, plan.device),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "weight_bytes": sum(parameter.nbytes for parameter in parameters),
            "gradient_bytes": sum(parameter.main_grad.nbytes for parameter in parameters),
            "machine": _machine(plan.device),
        }


def _build(plan: RunPlan, patches: Any, *, head: bool) -> tuple[Any, Callable[[], None]]:
    """The wrapped model, and what runs it forward and backward once."""
    import torch
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.training.argument_utils import hybrid_config_from_args
    from megatron.training.training import get_megatron_ddp_config

    args = _parsed(plan)
    config = hybrid_config_from_args(args)
    if head:
        config.hybrid_layer_pattern = ""  # a stage without layers, which upstream allows
    patches.configure(config.transformer)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_model(groups, pre_process=head, post_process=head)
    if head and args.nam_fused_cross_entropy:
        from megacpp_stp.flce.megatron import install_flce

        install_flce([model], backend=args.nam_fused_cross_entropy)
    wrapped = model = model.to(plan.device)
    if args.bf16 or args.fp16:
        wrapped = Float16Module(config.transformer, model)
        for module in model.modules():
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()
    wrapped = DistributedDataParallel(config.transformer, get_megatron_ddp_config(args), wrapped).train()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=plan.device))
    return wrapped, _pass_of_head(wrapped, args) if head else _pass_of_layer(wrapped, model, args)


def _parsed(plan: RunPlan) -> Any:
    """Megatron's arguments, parsed and validated as in a run, which are then its global ones."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_args

    from megacpp_stp.training.arguments import add_nam_arguments

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    sys.argv[1:] = [*plan.argv, "--nam-plan", "plan.json", "--nam-run-dir", "."]
    args = parse_args(extra_args_provider=add_nam_arguments)
    validate_args(args)
    args.vocab_size = plan.recipe.model.vocab_size  # what the tokenizer would say; Megatron pads it
    set_args(args)
    return args


def _pass_of_layer(wrapped: Any, model: Any, args: Any) -> Callable[[], None]:
    import torch
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

    device = next(model.parameters()).device
    shape, random = (args.seq_length, args.micro_batch_size, args.hidden_size), torch.Generator().manual_seed(2)
    hidden, cotangent = (torch.randn(shape, generator=random).to(device, args.params_dtype) for _ in range(2))

    def run() -> None:
        leaf = hidden.detach().requires_grad_()
        model.set_input_tensor([leaf])
        # As the first and last of one rank, the 16-bit wrapper would make the output fp32.
        more = {"fp32_output": False} if args.bf16 or args.fp16 else {}
        output = wrapped(None, None, None, **more)
        # As Megatron's schedules: what the next stage has got is no longer held.
        deallocate_output_tensor(output, True)
        custom_backward(output, cotangent)

    return run


def _pass_of_head(wrapped: Any, args: Any) -> Callable[[], None]:
    import torch
    from megatron.core.pipeline_parallel.schedules import custom_backward

    shape, random = (args.micro_batch_size, args.seq_length), torch.Generator().manual_seed(2)
    device = next(wrapped.parameters()).device
    tokens, labels = (torch.randint(args.vocab_size, shape, generator=random).to(device) for _ in range(2))
    positions = torch.arange(args.seq_length, device=device).repeat(args.micro_batch_size, 1)

    def run() -> None:
        custom_backward(wrapped(tokens, positions, None, labels=labels).float().mean(), None)

    return run


def _cpu_seconds(run: Callable[[], None]) -> float:
    import torch

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def _gpu_seconds(run: Callable[[], None]) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_bytes(run: Callable[[], None], device: str) -> int:
    """What one pass adds at its peak to weights and gradients."""
    if device == "cpu":
        # Last, for it slows the allocator: what is freed leaves the process at once.
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)
    peak = GpuPeak() if device == "cuda" else CpuPeak()
    run()
    return peak.added_bytes()


def _machine(device: str) -> dict[str, Any]:
    """Hardware and versions; no host name, no path."""
    import torch

    from megacpp_stp.training.facts import substrate

    found = substrate(device)
    if device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        found["hardware"] |= {"cpu": names[0] if names else "", "threads": torch.get_num_threads()}
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
