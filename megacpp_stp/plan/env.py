"""The environment variables that a run needs, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EnvVar:
    """One variable that the launcher sets.

    Attributes:
        name: The variable.
        value: What it is set to.
        why: The reason, for the plan and for the next reader.
        replaces: Whether it may replace another value that is set already. Else that is an error.
    """

    name: str
    value: str
    why: str
    replaces: bool = False


def environment(*, device: str) -> tuple[EnvVar, ...]:
    """Variables for one device kind, sorted by name.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    found = [
        EnvVar("CUDA_DEVICE_MAX_CONNECTIONS", "1", "Megatron orders communication before compute by it"),
        EnvVar("HF_HUB_OFFLINE", "1", "the tokenizer is a local directory; a run must not look anything up"),
        EnvVar("OMP_NUM_THREADS", "1", "one process a core or GPU; threads would fight"),
        EnvVar("TOKENIZERS_PARALLELISM", "false", "tokenizer threads do not survive a forked data worker"),
    ]
    if device == "cpu":
        found += [
            EnvVar("CUDA_VISIBLE_DEVICES", "", "--device cpu never touches a GPU", replaces=True),
            EnvVar("TORCHDYNAMO_DISABLE", "1", "Megatron's fused element-wise kernels run eagerly on a CPU"),
        ]
    return tuple(sorted(found, key=lambda variable: variable.name))
