"""Options of Megatron that no key of a recipe stands for and that contradict none: passed on as written.

An allow-list, since most of Megatron's 847 options would change the model, its numbers, its layout or its memory
behind the plan's back. These watch, time, schedule or speed up what the recipe says. Whether a value fits is for
Megatron's own parser to say (``megacpp-stp check``, and each launch).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.schema import Recipe

ALLOWED = frozenset(
    {
        # What is logged, and where to
        "log-device-memory-used",
        "log-energy",
        "log-max-attention-logit",
        "log-memory-interval",
        "log-memory-to-tensorboard",
        "log-num-zeros-in-grad",
        "log-params-norm",
        "log-progress",
        "log-straggler",
        "log-throughput",
        "log-timers-to-tensorboard",
        "log-validation-ppl-to-tensorboard",
        "log-world-size-to-tensorboard",
        "logging-level",
        "moe-per-layer-logging",
        "no-barrier-with-level-1-timing",
        "no-one-logger",
        "tensorboard-dir",
        "tensorboard-log-interval",
        "tensorboard-queue-size",
        "timing-log-level",
        "timing-log-option",
        "wandb-entity",
        "wandb-exp-name",
        "wandb-project",
        "wandb-save-dir",
        # Profiles
        "memory-snapshot-path",
        "profile",
        "profile-ranks",
        "profile-step-end",
        "profile-step-start",
        "pytorch-profiler-collect-callstack",
        "pytorch-profiler-collect-shapes",
        "record-memory-history",
        "use-pytorch-profiler",
        # Checks and time limits
        "check-weight-hash-across-dp-replicas-interval",
        "deterministic-mode",
        "exit-duration-in-mins",
        "exit-signal-handler",
        # Kernels and schedules that compute the same
        "attention-backend",
        "dsa-kernel-backend",
        "empty-unused-memory-level",
        "manual-gc",
        "manual-gc-interval",
        "moe-permute-fusion",
        "moe-router-fusion",
        "moe-shared-expert-overlap",
        "nccl-communicator-config-path",
        "tp-comm-overlap",
        # Data loading
        "data-cache-path",
        "num-dataset-builder-threads",
    }
)


def passed_through(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """The recipe's ``megatron`` section as options with values, and the field of each, by name.

    Raises:
        UserError: An option that is not on the list, or a value that is no value.
    """
    for name, value in sorted(recipe.megatron.items()):  # not in the order of the file
        field = f"megatron.{name}"
        if name not in ALLOWED:
            close = difflib.get_close_matches(name, ALLOWED, n=1)
            raise UserError(
                "is not an option that can be passed on: it might contradict what the recipe says",
                field=field,
                value=value,
                fix=f"did you mean {close[0]}?" if close else "use the key of the recipe; docs/recipes.md has the list",
            )
        if value is False:
            raise UserError(
                "is no way to switch an option off",
                field=field,
                value=value,
                fix="leave it out, or name the option that Megatron has for that",
            )
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        yield (f"--{name}", *map(str, values)), field
