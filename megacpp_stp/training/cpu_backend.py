"""The one place that lets megatron-core run without a GPU.

Megatron-core writes ``device="cuda"`` and calls ``torch.cuda`` as if a GPU were always there.  `REDIRECTS` lists,
site by site, what answers instead on a CPU; `install` puts it in place and its handle takes it away again.  Nothing
happens at import.  ``torch.cuda.is_available()`` stays False, so torch itself (optimizers, data loaders, distributed
checkpoints) keeps to its CPU paths.

What calls a torch function is redirected through a function mode.  A mode belongs to the thread that entered it: the
backward pass of a CPU tensor runs in that thread, a data loader's pin-memory thread or a thread of your own does not.

The device's default random stream is the CPU's; `megacpp_stp.training.streams` says what that means for a resumed run.

Sites are megatron-core 0.19.2's, as ``folder/file.py:function``.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from megacpp_stp.errors import UserError
from megacpp_stp.training.facts import resident_memory_stats
from megacpp_stp.training.nested_backward import backward
from megacpp_stp.training.torch_adam import get_loadable_optimizer

_MARK = "megacpp_stp_cpu_backend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """One thing that megatron-core asks of CUDA, and what answers on a CPU.

    Attributes:
        target: ``module:attribute``, or for what only a function mode can see ``Tensor.<method>`` or ``device=``.
        answer: Stands in; for ``device=`` it gives the device.
        sites: Upstream functions that need it.
        why: What would happen without it.
        feature: ``training`` when every training run needs it, else the feature that does.
    """

    target: str
    answer: Callable[..., Any]
    sites: tuple[str, ...]
    why: str
    feature: str = "training"


class CpuStream:
    """A stream on a device that has none: everything has happened by the time it is asked for."""

    def wait_stream(self, stream: object) -> None:
        """There is nothing to wait for."""

    def record_event(self) -> torch.cuda.Event:
        """An event that was never recorded: waiting for it returns at once, without a GPU."""
        return torch.cuda.Event()


def _do_nothing(*args: object, **kwargs: object) -> None:
    return None


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _initialize_megatron(*args: Any, **kwargs: Any) -> Any:
    from megatron.training.initialize import initialize_megatron

    return initialize_megatron(*args, allow_no_cuda=True, **kwargs)


def _move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _stay(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return tensor


def _type_as_if_on_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    answer = tensor.type(*args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer


REDIRECTS: tuple[Redirect, ...] = (
    Redirect(
        target="torch.cuda:device_count",
        answer=lambda: 1,
        sites=("training/initialize.py:_initialize_distributed", "training/initialize.py:_set_random_seed"),
        why="with 0 upstream makes no parallel groups and seeds no tracker; each rank has one device, the CPU",
    ),
    Redirect(
        target="torch.cuda:set_device",
        answer=_do_nothing,
        sites=("training/initialize.py:_initialize_distributed",),
        why="looks for a driver",
    ),
    Redirect(
        target="torch.cuda:current_device",
        answer=lambda: 0,
        sites=(
            "core/pipeline_parallel/p2p_communication.py:create_tensor_recv_next",
            "core/transformer/moe/router.py:gating",
            "training/initialize.py:finish_mpu_init",
        ),
        why="looks for a driver; the index comes back as a device= argument, which the mode takes for the CPU",
    ),
    Redirect(
        target="torch.cuda:synchronize",
        answer=_do_nothing,
        sites=(
            "core/timers.py:start",
            "core/pipeline_parallel/p2p_communication.py:_communicate",
            "core/dist_checkpointing/strategies/filesystem_async.py:preload_tensors",
        ),
        why="looks for a driver; a CPU call has finished when it returns",
    ),
    Redirect(
        target="torch.cuda:Stream",
        answer=CpuStream,
        sites=(
            "training/models/dist_utils.py:_ddp_wrap",
            "core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher.__init__",
        ),
        why="looks for a driver",
    ),
    Redirect(
        target="torch.cuda:current_stream",
        answer=CpuStream,
        sites=("training/models/dist_utils.py:_ddp_wrap", "core/distributed/param_and_grad_buffer.py:start_grad_sync"),
        why="looks for a driver",
    ),
    Redirect(
        target="torch.cuda:manual_seed",
        answer=_manual_seed,
        sites=(
            "core/tensor_parallel/random.py:model_parallel_cuda_manual_seed",
            "core/tensor_parallel/random.py:CudaRNGStatesTracker.add",
        ),
        why="is put off until CUDA starts, which is never: all trackers would share one state",
    ),
    Redirect(
        target="torch.cuda:get_rng_state",
        answer=_get_rng_state,
        sites=(
            "core/tensor_parallel/random.py:CudaRNGStatesTracker.add",
            "core/rerun_state_machine.py:_save_state",
            "training/checkpointing.py:get_rng_state",
        ),
        why="looks for a driver",
    ),
    Redirect(
        target="torch.cuda.random:get_rng_state",
        answer=_get_rng_state,
        sites=("core/tensor_parallel/random.py:_get_cuda_rng_state",),
        why="the same function by its other name",
    ),
    Redirect(
        target="torch.cuda:set_rng_state",
        answer=_set_rng_state,
        sites=("training/checkpointing.py:load_checkpoint", "core/rerun_state_machine.py:_restore_state"),
        why="is put off until CUDA starts, which is never: a resumed run would draw other numbers",
        feature="resuming from a checkpoint",
    ),
    Redirect(
        target="torch.cuda.memory:memory_stats_as_nested_dict",
        answer=resident_memory_stats,
        sites=("training/utils/common_utils.py:report_memory", "training/training.py:training_log"),
        why="is empty without CUDA, so the log would say 0 MB; torch derives its four memory counters from it",
    ),
    Redirect(
        target="torch.cuda:get_device_properties",
        answer=lambda device=None: SimpleNamespace(name="cpu", major=0, minor=0),
        sites=("training/utils/common_utils.py:get_device_arch_version",),
        why="looks for a driver; a CPU has no compute capability",
        feature="tensor parallelism",
    ),
    Redirect(
        target="device=",
        answer=lambda: torch.device("cpu"),
        sites=(
            "training/training.py:pretrain",
            "core/pipeline_parallel/schedules.py:forward_backward_no_pipelining",
            "core/optimizer/clip_grads.py:get_grad_norm_fp32",
        ),
        why="tensors are made with device='cuda', or with the current device's index",
    ),
    Redirect(
        target="Tensor.type",
        answer=_type_as_if_on_cuda,
        sites=(
            "core/optimizer/clip_grads.py:clip_grad_by_total_norm_fp32",
            "core/optimizer/distrib_optimizer.py:_build_model_and_main_param_groups",
            "core/optimizer/optimizer.py:Float16OptimizerWithFloat16Params.__init__",
        ),
        why="the answer is compared with 'torch.cuda.FloatTensor' and its like",
    ),
    Redirect(
        target="Tensor.cuda",
        answer=_stay,
        sites=(
            "training/models/dist_utils.py:prepare_existing_model_chunks_for_distributed_training",
            "core/models/common/language_module/language_module.py:setup_embeddings_and_output_layer",
        ),
        why="the model is moved to the device after it was built",
        feature="initialisation on the device, tied embeddings",
    ),
    Redirect(
        target="megatron.training.training:initialize_megatron",
        answer=_initialize_megatron,
        sites=("training/training.py:pretrain",),
        why="asserts a GPU unless it gets upstream's own allow_no_cuda, which pretrain() cannot pass on",
    ),
    Redirect(
        target="megatron.training.training:get_megatron_optimizer",
        answer=get_loadable_optimizer,
        sites=("training/training.py:setup_model_and_optimizer",),
        why="there are no CPU kernels but torch's Adam, from whose state upstream's distributed optimizer cannot load",
        feature="resuming from a checkpoint",
    ),
    Redirect(
        target="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        answer=_set_rng_state,
        sites=(
            "core/tensor_parallel/random.py:CudaRNGStatesTracker.fork",
            "core/tensor_parallel/random.py:_set_all_rng_states",
        ),
        why="is put off until CUDA starts: every fork would draw from, and advance, the default stream",
    ),
    Redirect(
        target="torch.autograd:backward",
        answer=backward,
        sites=("core/tensor_parallel/random.py:CheckpointFunction.backward",),
        why="leaves the function mode: a layer recomputed in a recomputed layer would ask for CUDA",
        feature="recomputation",
    ),
    Redirect(
        target="megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        answer=_move_to_host,
        sites=("core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",),
        why="turns split sizes into numpy on the way from a GPU only; gloo's all-to-all needs numbers",
        feature="expert parallelism with the alltoall dispatcher",
    ),
)


class _CudaToCpu(TorchFunctionMode):
    """Answers the calls of `REDIRECTS` that are no attribute of a module."""

    def __init__(self, redirects: Mapping[str, Redirect], hits: Counter[str]) -> None:
        super().__init__()
        self._hits = hits
        self._device = redirects["device="].answer()
        self._methods = {
            getattr(torch.Tensor, target.removeprefix("Tensor.")): redirect
            for target, redirect in redirects.items()
            if target.startswith("Tensor.")
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        redirect = self._methods.get(func)
        if redirect is not None:
            self._hits[redirect.target] += 1
            return redirect.answer(*args, **kwargs)
        if _is_cuda(kwargs.get("device")):
            self._hits["device="] += 1
            kwargs = {**kwargs, "device": self._device}
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    """Whether a ``device=`` argument names a GPU; a bare index always does."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class CpuBackend(AbstractContextManager["CpuBackend"]):
    """The installed redirects; leaving the context is `undo`.

    Attributes:
        hits: How often each target was asked for.
    """

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self._originals: list[tuple[Any, str, Any]] = []
        self._mode: _CudaToCpu | None = None

    def undo(self) -> None:
        """Put every original object back, the last one replaced first.  A second call does nothing.

        Raises:
            RuntimeError: Another function mode was entered since and is still active.
        """
        if self._mode is not None:
            if torch.overrides._get_current_function_mode() is not self._mode:
                raise RuntimeError("leave the function modes entered after the CPU backend before undoing it")
            self._mode.__exit__(None, None, None)
            self._mode = None
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.undo()

    def _install(self) -> None:
        mode = _CudaToCpu({redirect.target: redirect for redirect in REDIRECTS}, self.hits)
        mode.__enter__()
        self._mode = mode
        for redirect in REDIRECTS:
            if ":" in redirect.target:
                module, name = redirect.target.split(":")
                owner = importlib.import_module(module)
                self._originals.append((owner, name, getattr(owner, name)))
                setattr(owner, name, _counted(redirect, self.hits))


def _counted(redirect: Redirect, hits: Counter[str]) -> Any:
    """The redirect's answer, counting its calls; a class stays a class."""
    answer = redirect.answer
    if isinstance(answer, type):

        def count(self: object, *args: object, **kwargs: object) -> None:
            hits[redirect.target] += 1

        return type(answer.__name__, (answer,), {"__init__": count, _MARK: True})

    def counting(*args: Any, **kwargs: Any) -> Any:
        hits[redirect.target] += 1
        return answer(*args, **kwargs)

    setattr(counting, _MARK, True)
    return counting


def install() -> CpuBackend:
    """Make this process run megatron-core on the CPU.

    Call it before anything of megatron-core runs, and only for a CPU run.

    Returns:
        The handle that undoes it; also a context manager.

    Raises:
        UserError: CUDA is in use in this process already, or ``TORCHDYNAMO_DISABLE=1`` is not set: upstream compiles
            its fused functions, and a compiled function does not see the redirects.
        RuntimeError: It is installed already.
    """
    if hasattr(torch.cuda.current_device, _MARK):
        raise RuntimeError("the CPU backend is installed already")
    if torch.cuda.is_initialized():
        raise UserError(
            "CUDA is in use in this process already",
            field="--device",
            value="cpu",
            fix="start a CPU run in a process of its own, with CUDA_VISIBLE_DEVICES empty",
        )
    if os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        raise UserError(
            "torch.compile must be off on a CPU",
            field="TORCHDYNAMO_DISABLE",
            value=os.environ.get("TORCHDYNAMO_DISABLE"),
            fix="set TORCHDYNAMO_DISABLE=1 before Python starts",
        )
    backend = CpuBackend()
    try:
        backend._install()
    except BaseException:
        backend.undo()
        raise
    return backend
