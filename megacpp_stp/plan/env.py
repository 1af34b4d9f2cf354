"""The environment variables that a run needs, each with its reason.

Facts of torch's variables are from the headers of torch 2.15 (``ProcessGroupNCCL.hpp``, ``FlightRecorder.hpp``,
``AllocatorConfig.h``), those of Megatron's from megatron-core 0.19.2.  `megacpp_stp.plan.env_guard` judges what a shell
has set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.schema import Recipe

FIELD = "launch.environment"
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_FLIGHT_RECORDS = 2000
RANKS_END_S = 15
"""How long torchrun lets ranks end before it kills them: half of what Slurm gives a job, as it is by default."""
# What torchrun and the launcher say to each rank.
_OF_THE_LAUNCH = re.compile(
    r"(RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|(LOCAL_|ROLE_|GROUP_)?WORLD_SIZE|MASTER_(ADDR|PORT)|PYTHONUNBUFFERED"
    r"|(TORCHELASTIC|PET|MEGACPP_STP|SLURM|LD|PYTHON)_?\w*|PATH|HOME)"
)
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")


@dataclass(frozen=True, slots=True)
class EnvVar:
    """One variable that the launcher sets.

    Attributes:
        name: The variable.
        value: What it is set to.
        why: The reason, for the plan and for the next reader.
        replaces: Whether it may replace another value that is set already, which nobody can have meant for the run.
            Else that is an error.
        fixed: Whether another value would contradict the plan, so that no recipe may give one.
    """

    name: str
    value: str
    why: str
    replaces: bool = False
    fixed: bool = False


def environment(recipe: Recipe, *, device: str) -> tuple[EnvVar, ...]:
    """The variables of a plan, sorted by name: derived, or from ``launch.environment``.

    Args:
        recipe: The recipe.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: A name or value in ``launch.environment`` that contradicts the plan or does not belong there.
    """
    found = {variable.name: variable for variable in _derived(recipe, device=device)}
    for name, given in recipe.launch.environment.items():
        value = None if given is None else str(given)
        _check_given(name, value)
        known = found.pop(name, None)
        if known is not None and known.fixed and value != known.value:
            raise UserError(
                f"the run needs {known.value!r}: {known.why}", field=f"{FIELD}.{name}", value=given, fix="leave it out"
            )
        if value is not None:
            instead = f", in place of {known.value!r}" if known is not None and known.value != value else ""
            found[name] = EnvVar(name, value, f"{FIELD}{instead}")
    return tuple(found[name] for name in sorted(found))


def _derived(recipe: Recipe, *, device: str) -> Iterator[EnvVar]:
    yield EnvVar(
        "HF_HUB_OFFLINE", "1", "the tokenizer is a local directory; a run must not look anything up", fixed=True
    )
    yield EnvVar("OMP_NUM_THREADS", "1", "one process a core or GPU; threads would fight")
    yield EnvVar("TOKENIZERS_PARALLELISM", "false", "tokenizer threads do not survive a forked data worker", fixed=True)
    if recipe.parallel.tensor > 1 or recipe.parallel.context > 1:
        # arguments.py asserts it below Blackwell; elsewhere more connections let communication overlap better.
        why = "Megatron orders communication before compute by it, and asks for it with tensor or context parallelism"
        yield EnvVar(_CONNECTIONS, "1", why, fixed=True)
    if "deterministic-mode" in recipe.megatron:
        why = "megatron.deterministic-mode, which Megatron would set itself (determinism.py)"
        yield EnvVar("CUBLAS_WORKSPACE_CONFIG", ":4096:8", why, fixed=True)
        yield EnvVar("NCCL_ALGO", "Ring", why, fixed=True)
        yield EnvVar("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", why, fixed=True)
    yield from _of_cpus() if device == "cpu" else _of_gpus()


def _of_cpus() -> Iterator[EnvVar]:
    yield EnvVar("CUDA_VISIBLE_DEVICES", "", "--device cpu never touches a GPU", replaces=True, fixed=True)
    why = "Megatron's fused element-wise kernels run eagerly on a CPU"
    yield EnvVar("TORCHDYNAMO_DISABLE", "1", why, fixed=True)


def _of_gpus() -> Iterator[EnvVar]:
    # The name since torch 2.9. The old one, which torch still reads first, is refused when a shell has set it.
    why = "tensors of ever new sizes (experts' tokens) would break the GPU's memory into pieces"
    yield EnvVar("PYTORCH_ALLOC_CONF", "expandable_segments:True", why)
    why = "fp32 products stay fp32: container images switch TF32 on by it"
    yield EnvVar("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0", why)
    why = "a collective that fails or takes too long ends its rank, and with it the run"
    yield EnvVar("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3", why)
    yield EnvVar("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "which rank waited where, written down when a collective hangs")
    why = "collectives that each rank remembers for that"
    yield EnvVar("TORCH_NCCL_TRACE_BUFFER_SIZE", str(_FLIGHT_RECORDS), why)


def run_environment(recipe: Recipe, *, device: str, run_dir: Path, logs: Path, node: int) -> tuple[EnvVar, ...]:
    """What only a run knows, and no plan: its places.

    Args:
        recipe: The recipe.
        device: ``cpu`` or ``cuda``.
        run_dir: The run directory.
        logs: Where this start's logs go.
        node: Rank of this node.
    """
    why = (
        "seconds from SIGTERM to SIGKILL for ranks, so that the receipt is closed before a scheduler kills its launcher"
    )
    found = [
        EnvVar("PYTHONUNBUFFERED", "1", "lines of a rank are seen when they are printed", replaces=True),
        EnvVar("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(RANKS_END_S), why),  # torch 2.11 has its own 30
    ]
    if device == "cuda":
        place, why = (
            str(run_dir / "cache" / f"triton-{node}"),
            "kernels compiled once a node and run, in no home folder",
        )
        found.append(EnvVar("TRITON_CACHE_DIR", place, why))
        why = "where the record of a hung collective goes; each rank adds its number"
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
            found.append(EnvVar(name, str(logs / "collectives-"), why))
    return tuple(variable for variable in found if variable.name not in recipe.launch.environment)


def _check_given(name: str, value: str | None) -> None:
    field = f"{FIELD}.{name}"
    if _OF_THE_LAUNCH.fullmatch(name):
        raise UserError(
            "is for torchrun, the launcher or the shell to set", field=field, value=value, fix="leave it out"
        )
    if value is not None and SECRET.search(name):
        raise UserError(
            "would be kept in plan.json for everybody to read",
            field=field,
            fix="leave it out, and export it in the shell",
        )
