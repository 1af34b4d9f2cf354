"""The checkpoint that a run goes on from: whole, and its own.

It says which plan wrote it: one of another run would go on with other weights, if only sizes are equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.runs.checkpoints import CHECKPOINTS
from megacpp_stp.runs.receipt import Receipt

_DIGEST = "nam_plan_digest"
_FIX = "bring it back, or move it away to go on from an earlier one"


def mark(args: Any, plan_digest: str) -> None:
    """Have Megatron write the digest of the plan into its checkpoints, which hold all of its arguments."""
    setattr(args, _DIGEST, plan_digest)


def require_own(directory: Path) -> None:
    """Refuse to go on from a checkpoint that no plan of this run wrote. One that does not say, as of before, passes.

    Args:
        directory: The run directory; its receipt says from which iteration, and which plans the run has had.

    Raises:
        UserError: Another plan wrote it, or it is damaged.
    """
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    receipt = Receipt(directory)
    folder = directory / CHECKPOINTS / f"iter_{receipt.from_iteration:07d}"
    try:
        _require_whole(folder)
        wrote = getattr(load_common_state_dict(folder).get("args"), _DIGEST, None)
    except UserError:
        raise
    except Exception as error:  # whatever unpickling damaged bytes ends in
        problem = f"iteration {receipt.from_iteration} cannot be read: {type(error).__name__}: {error}".rstrip(": ")
        raise UserError(problem.splitlines()[0], field="checkpoint", fix=_FIX) from error
    if wrote is not None and wrote not in receipt.plan_digests:
        raise UserError(
            f"iteration {receipt.from_iteration} was written by another plan than this run's ({wrote[:12]})",
            field="checkpoint",
            fix="bring the run's own back, or move it away to go on from an earlier one",
        )


def _require_whole(folder: Path) -> None:
    """Hold the files of a checkpoint against what its index says of them (torch's ``FileSystemWriter``).

    Raises:
        UserError: One is gone, or shorter.
    """
    from torch.distributed.checkpoint import FileSystemReader

    ends: dict[str, int] = {}
    for part in FileSystemReader(folder).read_metadata().storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sorted(ends.items()):
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            problem = f"{name} of {folder.name} has {found} bytes of {size}"
            raise UserError(problem, field="checkpoint", fix=_FIX)
