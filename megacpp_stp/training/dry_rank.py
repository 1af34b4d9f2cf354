"""Ranks of a world that is not there, built one after the other in one process; see `megacpp_stp.training.dry_build`.

Run as ``python -m megacpp_stp.training.dry_rank`` with ``{"plan": ..., "ranks": [...]}`` on stdin: on stdout a line of
`Facts` for each rank, or the reason why one cannot be built.

Each rank goes Megatron's own way: its parser and validation with that rank's ``RANK`` and ``WORLD_SIZE``, its
``initialize_megatron``, its HybridModelBuilder with our spec, Float16Module and DDP around it, its optimizer.  Two
things stand in:

* torch's fake process group (Megatron's ``--fake-process-group``): groups of any size whose other ranks do not exist
  and whose collectives return at once.  Gloo groups are left out, as Megatron does for it: they would wait for peers.
* The meta device: parameters, gradient buffers and optimizer state have shapes and dtypes and no memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import tap_name
from megacpp_stp.training.dry_facts import BUILT, GROUPS, REFUSED, Chunk, Facts


class OnMeta(TorchFunctionMode):
    """Makes on the meta device what is asked for on a GPU; what names no device is for ``torch.device("meta")``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A torch call, with another device where it names a GPU."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            kwargs = {**kwargs, "device": torch.device("meta")}
        answer = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(answer, str):
            # Megatron's optimizers compare it with torch.cuda.FloatTensor and its like.
            return answer.replace("torch.cuda.meta.", "torch.cuda.").replace("torch.meta.", "torch.cuda.")
        return answer


def main() -> int:
    """Build what stdin asks for.

    Returns:
        0, or 1 when a rank could not be built; stdout says which and why.
    """
    from megacpp_stp.patches.registry import Registry
    from megacpp_stp.training.cpu_backend import install
    from megacpp_stp.training.upstream_check import answer_for_an_h200

    asked = json.load(sys.stdin)
    plan, rank = asked["plan"], None
    try:
        with install(), Registry.load().activate(plan) as patches:
            if plan["device"] == "cuda":
                answer_for_an_h200(import_module("megatron.training.arguments"))
            for rank in asked["ranks"]:
                with _rank_of(plan, rank) as args:
                    print(BUILT + _build(plan, args, patches).as_json(), flush=True)
    except Exception as error:
        where = "" if rank is None else f"rank {rank} of {plan['world_size']} cannot be built: "
        print(REFUSED + json.dumps(where + _reason(error)), flush=True)
        return 1
    return 0


@contextmanager
def _rank_of(plan: dict[str, Any], rank: int) -> Iterator[Any]:
    """Megatron, initialised as one rank; afterwards as if it never was.

    Yields:
        Its parsed and validated arguments.
    """
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import destroy_global_vars, set_args
    from megatron.training.initialize import initialize_megatron

    from megacpp_stp.training.arguments import add_nam_arguments

    per_node = plan["recipe"]["launch"]["processes_per_node"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node), "WORLD_SIZE": str(plan["world_size"])}
    sys.argv[1:] = [*plan["argv"], "--nam-plan", "plan.json", "--nam-run-dir", ".", "--fake-process-group"]
    args = parse_args(extra_args_provider=add_nam_arguments)
    validate_args(args)
    args.vocab_size = plan["recipe"]["model"]["vocab_size"]  # what the tokenizer would say; Megatron pads it
    try:
        set_args(args)
        initialize_megatron(allow_no_cuda=True)
        yield args
    finally:
        destroy_rerun_state_machine()
        destroy_global_vars()
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _build(plan: dict[str, Any], args: Any, patches: Any) -> Facts:
    """This rank's model, wrapped, with its optimizer."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.training import get_megatron_optimizer_config

    config = hybrid_config_from_args(args)
    patches.configure(config.transformer)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks: list[Chunk] = []
    taps: list[str] = []

    def before_wrap(models: list[Any]) -> list[Any]:
        chunks.extend(map(_chunk, models))
        taps.extend(_attach(models, args, groups))
        return models

    config.pre_wrap_hooks.append(before_wrap)
    ddp = pretrain_cfg_container_from_args(args, config).ddp
    optimizer_config, by_group = get_megatron_optimizer_config(args)
    with OnMeta(), torch.device("meta"):
        wrapped = config.get_builder_cls()(config).build_distributed_models(groups, ddp_config=ddp)
        optimizer = get_megatron_optimizer(
            optimizer_config, wrapped, config_overrides=by_group, use_gloo_process_groups=False
        )
    assert {parameter.device.type for model in wrapped for parameter in model.parameters()} == {"meta"}
    return Facts(
        rank=args.rank,
        groups={name: _members(getattr(groups, attribute)) for name, attribute in GROUPS.items()},
        chunks=tuple(chunks),
        taps=tuple(taps),
        optimized=sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]),
    )


def _chunk(model: Any) -> Chunk:
    layers = tuple((layer.layer_number, _count(layer)) for layer in model.decoder.layers)
    return Chunk(
        symbols="".join(model.decoder.layer_type_list),
        layers=layers,
        others=_count(model) - sum(count for _, count in layers),
    )


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _attach(models: Sequence[Any], args: Any, groups: Any) -> list[str]:
    """STP as a run installs it."""
    from megacpp_stp.stp.install import make_taps
    from megacpp_stp.training.arguments import stp_config

    config = stp_config(args)
    if config is None:
        return []
    taps = make_taps(config, models[0].config, groups, iteration=lambda: 0, data_rank=groups.dp.rank())
    return [tap_name(tap) for model in models for tap in taps.attach(model.decoder)]


def _members(group: Any) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))


def _reason(error: BaseException) -> str:
    """In upstream's words, with the line that said so where it is not ours."""
    import traceback

    if isinstance(error, UserError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split())
    return f"{type(error).__name__} at {last.name} ({last.line}): {words}"


if __name__ == "__main__":
    sys.exit(main())
