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
from megacpp_stp.runs.files import RECEIPT, read_json
from megacpp_stp.runs.lock import rank_lock
from megacpp_stp.runs.receipt import ALLOWED_UNREVIEWED
from megacpp_stp.training.arguments import add_nam_arguments, read_plan, stp_config
from megacpp_stp.training.orphans import die_with_parent, is_orphan
from megacpp_stp.training.progress import Progress


def main(argv: Sequence[str], *, is_program: bool = False) -> int:
    """Run one rank.

    Args:
        argv: Arguments without the program; they must be the plan's.
        is_program: Whether the process ends with it, which is then watched too.

    Returns:
        0, 2 after a mistake that the user can mend, said on stderr, or 1 where torchrun has ended already.
    """
    die_with_parent()  # torchrun ends its ranks, unless it is killed
    if is_orphan():
        print("megacpp-stp: torchrun is gone: this rank ends", file=sys.stderr, flush=True)
        return 1
    try:
        plan = read_plan(argv)
        directory = Path(argv[list(argv).index("--nam-run-dir") + 1])
        with ExitStack() as undo, rank_lock(directory), _reported(directory):
            _Rank(plan, is_program=is_program).run(undo, directory)
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

    def __init__(self, plan: dict[str, Any], *, is_program: bool) -> None:
        self._plan = plan
        self._is_program = is_program
        self._rank = int(os.environ["RANK"])
        self._cpu_backend: Any = None
        self._device: Any = None
        self._writer: Any = None
        self._patches: Any = None
        self._first_iteration_proven = False
        self._fused: Any = None
        self._chunks: list[Any] = []
        self._args: Any = None
        self._finite: Any = None
        self._progress = Progress(self._iteration)

    def run(self, undo: ExitStack, directory: Path) -> None:
        self._watched(undo, directory)
        self._on_device(undo)

        from megatron.training.arguments import parse_and_validate_args

        from megacpp_stp.training.health import outlast_suspensions
        from megacpp_stp.training.own_checkpoint import mark, require_own
        from megacpp_stp.training.preflight_ranks import compare_ranks

        self._patches = undo.enter_context(_planned_patches(self._plan, directory, rank=self._rank))
        met = compare_ranks(self._plan, [record.as_dict() for record in self._patches.records], rank=self._rank)
        self._args = args = parse_and_validate_args(extra_args_provider=add_nam_arguments)
        outlast_suspensions(self._plan, args)
        mark(args, self._plan["digest"])
        if args.load:
            require_own(directory)
        if self._rank == 0:
            from megacpp_stp.training.journal import Journal

            self._writer = Journal(args.nam_run_dir, self._plan)
            self._writer.ranks_met(met)
        try:
            weights = self._pretrain(args)
        except BaseException as error:
            if self._writer is not None:
                self._writer.failed(error)
            raise
        if self._writer is not None:
            self._writer.completed(weights_sha256=weights)

    def _watched(self, undo: ExitStack, directory: Path) -> None:
        """From before Megatron is imported until all else is undone."""
        from megacpp_stp.training.health import watchdog_of

        watchdog = watchdog_of(
            self._plan, directory, rank=self._rank, progress=self._progress, to_the_end=self._is_program
        )
        undo.enter_context(watchdog)

    def _on_device(self, undo: ExitStack) -> None:
        if self._plan["device"] == "cpu":
            from megacpp_stp.training.cpu_backend import install

            self._cpu_backend = undo.enter_context(install())
        self._device = rank_device(self._plan["device"])

    def _pretrain(self, args: Any) -> str:
        """The whole run; the digest of its weights."""
        from megatron.core.enums import ModelType
        from megatron.training import pretrain
        from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args

        from megacpp_stp.training.data import dataset_provider
        from megacpp_stp.training.step import ForwardStep
        from megacpp_stp.training.streams import keep_loaded_stream
        from megacpp_stp.training.weights import weights_digest

        recorder = self._recorder(args)
        model_config = hybrid_config_from_args(args)
        self._patches.configure(model_config.transformer)
        self._finite.install(model_config.transformer)
        recorder.install(model_config.transformer)
        model_config.pre_wrap_hooks.append(lambda chunks: self._before_wrap(chunks, args, recorder))
        provide: Any = dataset_provider()
        forward_step: Any = ForwardStep(
            device=self._device,
            recorder=recorder,
            end_of_document=self._manifest().tokenizer.eod_id,
            finite=self._finite,
            progress=self._progress,
        )
        if args.load:
            provide, forward_step = keep_loaded_stream(provide, forward_step)
        config = pretrain_cfg_container_from_args(args, model_config)
        pretrain(config, provide, ModelType.encoder_or_decoder, forward_step)
        self._progress.closing()
        recorder.end_evaluation()
        return weights_digest(self._chunks)

    def _iteration(self) -> int:
        """How many are completed. Until the first after a checkpoint, Megatron has the checkpoint's elsewhere."""
        return max(self._args.curr_iteration, self._args.iteration)

    def _manifest(self) -> Any:
        from megacpp_stp.data.manifest import load_manifest

        return load_manifest(Path(self._plan["recipe"]["data"]["path"]))

    def _recorder(self, args: Any) -> Any:
        from megacpp_stp.training.facts import peak_memory_bytes, totals_of, work_of
        from megacpp_stp.training.health import finite_of
        from megacpp_stp.training.recorder import Recorder
        from megacpp_stp.training.writers import share_times, write_scalars

        def emit(record: dict[str, Any]) -> None:
            self._prove_first_iteration()
            record |= self._finite.told(record)
            record |= work.speed(record["tokens_per_s"]) | totals.after(record)
            if args.tensorboard_dir and record["iteration"] % args.tensorboard_log_interval == 0:
                share_times(record, device=self._device)
            write_scalars(record, interval=args.tensorboard_log_interval)
            if self._writer is not None:
                self._writer.record(record)

        manifest, device = self._manifest(), self._plan["device"]
        work, totals = work_of(self._plan), totals_of(Path(args.nam_run_dir))
        self._finite = finite_of(
            self._plan, device=self._device, iteration=self._iteration, in_a_row=totals.nonfinite_in_a_row
        )
        return Recorder(
            device=self._device,
            iteration=self._iteration,
            progress=self._progress,
            tokens_per_iteration=args.global_batch_size * args.seq_length,
            bits_per_byte=lambda split, loss: manifest.bits_per_byte(split, loss_nats=loss),
            peak_memory=lambda: peak_memory_bytes(device),
            emit=emit,
            emit_validation=self._writer.validation if self._writer is not None else _ignore,
            before_save=(self._writer.saving if self._writer is not None else _ignore) if args.save else None,
        )

    def _before_wrap(self, chunks: list[Any], args: Any, recorder: Any) -> list[Any]:
        """On the bare model chunks: count parameters, install STP. Megatron is initialised by now."""
        from megatron.core import parallel_state

        from megacpp_stp.model.count import count_parameters
        from megacpp_stp.patches.agreement import gather, require_agreement
        from megacpp_stp.stp.install import install_stp

        self._chunks = list(chunks)
        stages = count_parameters(chunks, device=self._device)
        patches = gather([record.as_dict() for record in self._patches.records])
        require_agreement(patches)
        if self._writer is not None:
            stack = type(chunks[0].decoder)
            self._writer.model_built(stages, stack=f"{stack.__module__}.{stack.__qualname__}", patches=patches)
        if args.nam_fused_cross_entropy:
            from megacpp_stp.flce.megatron import install_flce

            self._fused = install_flce(chunks, backend=args.nam_fused_cross_entropy)
        config = stp_config(args)
        if config is not None:
            data_rank = parallel_state.get_data_parallel_rank()
            taps = install_stp(chunks, config, iteration=lambda: args.curr_iteration, data_rank=data_rank)
            recorder.observe_stp(taps)
            self._finite.observe_stp(taps)
        return chunks

    def _prove_first_iteration(self) -> None:
        """Once, on every rank: what was put in the place of upstream's code is what the run calls."""
        from megacpp_stp.patches.agreement import gather, require_called
        from megacpp_stp.training.collected import collected_here, ranks_by_loss

        if self._first_iteration_proven:
            return
        self._first_iteration_proven = True
        calls = gather(self._patches.calls())
        require_called(self._patches.ledger, calls)
        auxiliary = ranks_by_loss(gather(collected_here()))
        fused = None
        if self._fused is not None:
            fused = gather([self._fused.heads, self._fused.calls])
            _require_fused_losses(fused)
        if self._writer is None:
            return
        redirects = sorted(self._cpu_backend.hits) if self._cpu_backend is not None else None
        self._writer.patches_called(calls, cpu_backend=redirects)
        self._writer.collected(auxiliary)
        if fused is not None:
            backend = self._plan["recipe"]["training"]["fused_cross_entropy"]
            self._writer.loss_fused(backend, sum(losses for _, losses in fused))


def _require_fused_losses(by_rank: Sequence[Sequence[int]]) -> None:
    """Compare the output heads of each rank with the losses that it computed without logits.

    Raises:
        UserError: A head that none went through; the same error on every rank.
    """
    heads = sum(count for count, _ in by_rank)
    silent = [rank for rank, (count, losses) in enumerate(by_rank) if count and not losses]
    if silent or not heads:
        raise UserError(
            f"computed no loss on rank {silent[0]}" if silent else "found no output head on any rank",
            field="training.fused_cross_entropy",
            fix="write null, and report this: the model computes its loss elsewhere",
        )


def _planned_patches(plan: dict[str, Any], directory: Path, *, rank: int) -> Any:
    """Make active what the plan lists, before the first collective. What may be unreviewed is in the receipt."""
    from megacpp_stp.patches.registry import Registry

    receipt = read_json(directory / RECEIPT) if (directory / RECEIPT).exists() else {}
    active = Registry.load().activate(plan, allow_unreviewed=receipt.get(ALLOWED_UNREVIEWED) or ())
    for record in active.records:
        if record.warning and rank == 0:
            print(f"megacpp-stp: {record.warning}", file=sys.stderr, flush=True)
    return active


def rank_device(kind: str) -> Any:
    """Where this rank computes, on ``cpu`` or ``cuda``.

    By torchrun's local rank, not by the current device: Megatron sets that only when it initialises.
    """
    import torch

    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _ignore(*record: Any) -> None:
    """What ranks other than 0 do with a record."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], is_program=True))
