"""Megatron's own word on an argv, before any rank is started.

Run as ``python -m megacpp_stp.training.upstream_check ARGV...`` in a process of its own: upstream's parser and
validator change the process that calls them. Needs no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan

_REFUSED = "megacpp-stp: upstream refuses: "
_TIMEOUT_S = 300


def require_accepted(plan: RunPlan) -> None:
    """Let Megatron parse and validate the plan's arguments.

    Raises:
        UserError: With upstream's own words.
    """
    command = [sys.executable, "-m", __name__, *plan.argv, "--nam-plan", "plan.json", "--nam-run-dir", "."]
    environment = {**os.environ, **{variable.name: variable.value for variable in plan.env}}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(plan.world_size)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"megatron-core did not validate the arguments within {_TIMEOUT_S} s",
            field="arguments",
            fix="is the machine overloaded, or its file system slow? try again",
        ) from None
    if done.returncode == 0:
        return
    raise UserError(
        f"megatron-core refuses the arguments: {_reason(done.stderr)}",
        field="arguments",
        fix="change the recipe field that asked for it; `megacpp-stp plan` shows which one it is",
    )


def _reason(stderr: str) -> str:
    for line in stderr.splitlines():
        if line.startswith(_REFUSED):
            return line.removeprefix(_REFUSED)
        if found := re.search(r"error: (.*)", line):  # argparse
            return found[1]
    return stderr.strip().splitlines()[-1] if stderr.strip() else "no reason given"


def main(argv: Sequence[str]) -> int:
    """Parse and validate `argv` as a rank would, and build its configuration.

    Returns:
        0, or 1 with upstream's reason on stderr.
    """
    from megatron.training.argument_utils import hybrid_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from megacpp_stp.training.arguments import add_nam_arguments

    sys.argv[1:] = argv
    try:
        args = parse_args(extra_args_provider=add_nam_arguments)
        validate_args(args)
        # What the tokenizer would set; the launcher has compared it with the recipe.
        args.padded_vocab_size = args.padded_vocab_size or args.make_vocab_size_divisible_by
        hybrid_config_from_args(args)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or _failed_line(error)
        print(f"{_REFUSED}{reason}", file=sys.stderr)
        return 1
    return 0


def _failed_line(error: BaseException) -> str:
    """The source line of a bare assert."""
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {last.name}: {last.line}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
