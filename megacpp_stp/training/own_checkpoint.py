"""A checkpoint says which plan wrote it: one of another run would go on with other weights, if only sizes are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.checkpoints import CHECKPOINTS
from megacpp_stp.runs.receipt import Receipt

_DIGEST = "nam_plan_digest"


def mark(args: Any, plan_digest: str) -> None:
    """Have Megatron write the digest of the plan into its checkpoints, which hold all of its arguments."""
    setattr(args, _DIGEST, plan_digest)


def require_own(directory: Path) -> None:
    """Refuse to go on from a checkpoint that no plan of this run wrote. One that does not say, as of before, passes.

    Args:
        directory: The run directory; its receipt says from which iteration, and which plans the run has had.

    Raises:
        UserError: Another plan wrote it.
    """
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    receipt = Receipt(directory)
    folder = directory / CHECKPOINTS / f"iter_{receipt.from_iteration:07d}"
    wrote = getattr(load_common_state_dict(folder).get("args"), _DIGEST, None)
    if wrote is not None and wrote not in receipt.plan_digests:
        raise UserError(
            f"iteration {receipt.from_iteration} was written by another plan than this run's ({wrote[:12]})",
            field="checkpoint",
            fix="bring the run's own back, or move it away to go on from an earlier one",
        )
