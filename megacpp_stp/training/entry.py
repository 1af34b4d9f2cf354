"""``torchrun -m megacpp_stp.training.entry``: one rank of a run, on Megatron's own training loop.

The plan is verified, patch surfaces are applied, the model is built by Megatron's `HybridModelBuilder` from the spec
in the arguments, STP is installed through the builder's pre-wrap hook, and `megatron.training.pretrain` does the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.failures import report_failure
from megacpp_stp.training.arguments import add_nam_arguments, read_plan, stp_config


def main(argv: Sequence[str]) -> int:
    """Run one rank.

    Args:
        argv: Arguments without the program; they must be the plan's.

    Returns:
        0, or 2 after a mistake that the user can mend, said on stderr.
    """
    try:
        plan = read_plan(argv)
        directory = Path(argv[list(argv).index("--nam-run-dir") + 1])
        with ExitStack() as undo, _reported(directory):
            if plan["device"] == "cpu":
                from megacpp_stp.training.cpu_backend import install

                undo.enter_context(install())
            _Rank(plan).run(undo)
    except UserError as error:
        # From every rank: what is wrong on one stage may be right on the first.
        print(f"megacpp-stp: rank {os.environ.get('RANK', '?')}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


@contextmanager
def _reported(directory: Path) -> Iterator[None]:
    """Whatever ends this rank is written down before its process is gone."""
    try:
        yield
    except BaseException as error:
        report_failure(directory, rank=int(os.environ.get("RANK", "0")), error=error)
        raise


class _Rank:
    """What one rank of a run holds; lives for one `main`."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._rank = int(os.environ["RANK"])
        self._device = rank_device(plan["device"])
        self._writer: Any = None
        self._patches: list[Any] = []

    def run(self, undo: ExitStack) -> None:
        from megatron.training.arguments import parse_and_validate_args

        self._patches = [undo.enter_context(patch) for patch in _planned_patches(self._plan["patches"])]
        args = parse_and_validate_args(extra_args_provider=add_nam_arguments)
        if self._rank == 0:
            from megacpp_stp.training.journal import Journal

            self._writer = Journal(args.nam_run_dir, self._plan)
        try:
            self._pretrain(args)
        except BaseException as error:
            if self._writer is not None:
                self._writer.failed(error, kind="user" if isinstance(error, UserError) else "crash")
            raise
        if self._writer is not None:
            self._writer.completed()

    def _pretrain(self, args: Any) -> None:
        from megatron.core.enums import ModelType
        from megatron.training import pretrain
        from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args

        from megacpp_stp.training.data import dataset_provider
        from megacpp_stp.training.step import ForwardStep

        recorder = self._recorder(args)
        model_config = hybrid_config_from_args(args)
        recorder.install(model_config.transformer)
        model_config.pre_wrap_hooks.append(lambda chunks: self._before_wrap(chunks, args, recorder))
        forward_step = ForwardStep(
            device=self._device, recorder=recorder, check_nan=args.check_for_nan_in_loss_and_grad
        )
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            dataset_provider(),
            ModelType.encoder_or_decoder,
            forward_step,
        )
        recorder.end_evaluation()

    def _recorder(self, args: Any) -> Any:
        from megacpp_stp.data.manifest import load_manifest
        from megacpp_stp.training.facts import peak_memory_bytes
        from megacpp_stp.training.recorder import Recorder

        manifest = load_manifest(Path(self._plan["recipe"]["data"]["path"]))
        device = self._plan["device"]
        return Recorder(
            device=self._device,
            iteration=lambda: args.curr_iteration,
            tokens_per_iteration=args.global_batch_size * args.seq_length,
            bits_per_byte=lambda split, loss: manifest.bits_per_byte(split, loss_nats=loss),
            peak_memory=lambda: peak_memory_bytes(device),
            emit=self._writer.record if self._writer is not None else _ignore,
            emit_validation=self._writer.validation if self._writer is not None else _ignore,
        )

    def _before_wrap(self, chunks: list[Any], args: Any, recorder: Any) -> list[Any]:
        """On the bare model chunks: count parameters, install STP. Megatron is initialised by now."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        from megacpp_stp.model.count import count_parameters
        from megacpp_stp.stp.install import install_stp

        stages = count_parameters(chunks, device=self._device)
        patches: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(patches, [{"id": patch.surface.id, "state": patch.state} for patch in self._patches])
        if self._writer is not None:
            stack = type(chunks[0].decoder)
            self._writer.model_built(stages, stack=f"{stack.__module__}.{stack.__qualname__}", patches=patches)
        config = stp_config(args)
        if config is not None:
            data_rank = parallel_state.get_data_parallel_rank()
            taps = install_stp(chunks, config, iteration=lambda: args.curr_iteration, data_rank=data_rank)
            recorder.observe_stp(taps)
        return chunks


def _planned_patches(ids: Sequence[str]) -> Iterator[Any]:
    """Apply the surfaces that the plan names, each when it is asked for."""
    from megacpp_stp.patches import dataset_helpers, fp32_groups

    modules = {module.SURFACE.id: module for module in (dataset_helpers, fp32_groups)}
    for patch in ids:
        yield modules[patch].apply()


def rank_device(kind: str) -> Any:
    """Where this rank computes, on ``cpu`` or ``cuda``.

    By torchrun's local rank, not by the current device: Megatron sets that only when it initialises.
    """
    import torch

    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _ignore(record: Any) -> None:
    """What ranks other than 0 do with a record."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
