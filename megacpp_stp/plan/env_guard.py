"""What the shell has set already: refused where it would change a run behind its plan, recorded where it may stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.env import FIELD, SECRET, EnvVar
from megacpp_stp.plan.places import PLACE, has_place
from megacpp_stp.recipe.schema import Recipe

# Variables that change what Megatron, Transformer Engine, torch, NCCL, Triton or a math library computes or how.
_WATCHED = re.compile(
    r"(NVTE|NCCL|TORCH|TORCHINDUCTOR|TORCHDYNAMO|TORCHELASTIC|PYTORCH|PET|GLOO|TRITON|CUBLAS|CUBLASLT|CUDNN|MAMBA"
    r"|CAUSAL_CONV1D|FLASH_ATTENTION|MEGATRON|NVSHMEM|OMP|GOMP|MKL|KMP|DNNL|ONEDNN)_\w+|ATEN_CPU_CAPABILITY"
    r"|CUDA_LAUNCH_BLOCKING|CUDA_DEVICE_MAX_CONNECTIONS|NVIDIA_TF32_OVERRIDE|FP4_RECIPE|PYTHON_EXEC|PYTHONOPTIMIZE"
)
# Of those: what was built and where it lies, and what is printed.
_HARMLESS = re.compile(
    r"\w+_(VERSION|BUILD_NUMBER|BUILD_SHA|BUILD_VERSION|ARCH_LIST|HOME|PATH|CACHE_DIR|EXTENSIONS_DIR)"
    r"|TORCH_(LOGS|CPP_LOG_LEVEL|SHOW_CPP_STACKTRACES)|NCCL_DEBUG(_FILE|_SUBSYS)?|MEGATRON_LOGGING_LEVEL"
)
# The network of a machine: what no recipe can know, and what every machine may differ in.
_NETWORK = re.compile(
    r"GLOO_SOCKET_IFNAME|NCCL_(SOCKET_(IFNAME|FAMILY)|IB_(HCA|GID_INDEX|SL|TC|TIMEOUT|RETRY_CNT|DISABLE|CUDA_SUPPORT)"
    r"|NET|NET_PLUGIN|NET_GDR_LEVEL|TOPO_FILE|CROSS_NIC)"
)
# What NVIDIA's PyTorch images set (26.07): with these values, as they were built to run.
_OF_IMAGES = {"TORCH_NCCL_USE_COMM_NONBLOCKING": "0", "TORCHINDUCTOR_LOOP_ORDERING_AFTER_FUSION": "0"}
_RECORDED = (*_OF_IMAGES, "CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE", "NCCL_DEBUG", "WORLD_SIZE")
# What a receipt may show beside those that change what is computed, and the network's.
_SHOWN = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM")
_OF_A_HOST = re.compile(r"(^|_)(ADDR\w*|HOST\w*|COMM_ID|SERVER\w*|URL|URI|ENDPOINT|PROXY|USER\w*)(_|$)")
_AN_ADDRESS = re.compile(r"\d+(\.\d+){3}|://|@|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-")  # the last: of one GPU


def check_environment(variables: Iterable[EnvVar], recipe: Recipe, found: Mapping[str, str]) -> None:
    """Refuse what a shell has set against a plan, or beside it.

    Args:
        variables: The plan's and the run's.
        recipe: The plan's recipe; what its ``launch.environment`` names is allowed.
        found: The environment of the launcher.

    Raises:
        UserError: The first finding, with all others in its message.
    """
    findings = list(_findings({variable.name: variable for variable in variables}, recipe, found))
    if not findings:
        return
    (name, problem, fix), *rest = findings
    more = "".join(f"\n  also: {other}: {what}" for other, what, _ in rest)
    raise UserError(problem, field=name, fix=fix + more)


def replaced(variables: Iterable[EnvVar], found: Mapping[str, str]) -> Iterator[str]:
    """What of a shell the ranks do not get, in a line each: a variable that the run may set to another value.

    Args:
        variables: The plan's and the run's.
        found: The environment of the launcher.
    """
    for known in variables:
        value = found.get(known.name, known.value)
        if known.replaces and value != known.value:
            yield f"{known.name}: is set to {value!r}; the ranks get {known.value!r}: {known.why}"


def _findings(
    variables: Mapping[str, EnvVar], recipe: Recipe, found: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    for name in sorted(found):
        value, known = found[name], variables.get(name)
        if known is not None:
            if value != known.value and not known.replaces:
                allow = "" if known.fixed else f", or allow it in the recipe: {FIELD}: {{{name}: null}}"
                yield (
                    name,
                    f"is set to {value!r}, but the run needs {known.value!r}: {known.why}",
                    f"unset {name}{allow}",
                )
        elif _is_watched(name) and name not in recipe.launch.environment and _OF_IMAGES.get(name) != value:
            problem = f"is set to {value!r}, changes how a run computes, and is not in the plan"
            yield name, problem, f"unset {name}, or say in the recipe: {FIELD}: {{{name}: VALUE, or null to leave it}}"


def _is_watched(name: str) -> bool:
    return bool(_WATCHED.fullmatch(name)) and not _HARMLESS.fullmatch(name) and not _NETWORK.fullmatch(name)


def recorded_environment(plan: Mapping[str, object], found: Mapping[str, str]) -> dict[str, str]:
    """What a run directory keeps of a rank's environment: an allow-list, without places of the machine.

    Args:
        plan: The plan as plain data; its variables, and those that its recipe leaves to the machine.
        found: The environment of the rank.
    """
    recipe, planned = plan["recipe"], plan["env"]
    assert isinstance(recipe, Mapping) and isinstance(planned, Mapping)
    names = {*_RECORDED, *planned, *recipe["launch"]["environment"], *filter(_NETWORK.fullmatch, found)}
    kept = {name: found[name] for name in sorted(names) if name in found and not SECRET.search(name)}
    return {name: PLACE if has_place(value) else value for name, value in kept.items()}


def shown_environment(recorded: Mapping[str, str]) -> dict[str, str]:
    """What of `recorded_environment` a receipt shows to strangers: no secret, no host, nothing that nobody knows.

    Args:
        recorded: By name; places are out of it.
    """
    found = {name: value for name, value in recorded.items() if _is_shown(name)}
    return {name: "(an address)" if _AN_ADDRESS.search(value) else value for name, value in found.items()}


def computing_environment(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Of the variables that a receipt shows, those that change what is computed, or how: not the network's, not GPUs'
    numbers.

    Args:
        shown: By name; anybody may have written it.
    """
    return {name: value for name, value in shown.items() if _is_watched(name)}


def _is_shown(name: str) -> bool:
    known = name in _SHOWN or _is_watched(name) or bool(_NETWORK.fullmatch(name))
    return known and not _OF_A_HOST.search(name) and not SECRET.search(name)
