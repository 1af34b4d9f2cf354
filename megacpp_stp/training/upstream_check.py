"""Megatron's own word on an argv, before any rank is started.

Run as ``python -m megacpp_stp.training.upstream_check ARGV...`` in a process of its own: upstream's parser and
validator change the process that calls them. Needs no GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megacpp_stp.errors import UserError
from megacpp_stp.plan.build import RunPlan

_REFUSED = "megacpp-stp: upstream refuses: "
_VERDICT = "megacpp-stp: upstream verdict: "
_TIMEOUT_S = 300
_HOPPER = (9, 0)  # compute capability of the H200


@dataclass(frozen=True, slots=True)
class Derived:
    """One argument that Megatron's validation changed.

    Attributes:
        name: Megatron's name for it, as ``overlap_p2p_comm``.
        before: After parsing, as text.
        after: After validation, as text; empty when validation removed it.
        option: The option in the argv that asked for it; empty when the recipe did not say it.
    """

    name: str
    before: str
    after: str
    option: str


def ask_upstream(plan: RunPlan) -> list[Derived]:
    """Let Megatron parse and validate the plan's arguments.

    Returns:
        What validation changed or added, sorted by name.

    Raises:
        UserError: Upstream refuses, in its own words.
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
    for line in done.stdout.splitlines():
        if done.returncode == 0 and line.startswith(_VERDICT):
            return [Derived(**row) for row in json.loads(line.removeprefix(_VERDICT))]
    raise UserError(
        f"megatron-core refuses the arguments: {_reason(done.stderr)}",
        field="arguments",
        fix="change the recipe field that asked for it; `megacpp-stp plan` shows which one it is",
    )


def require_accepted(plan: RunPlan) -> list[Derived]:
    """Refuse a plan that Megatron refuses, or of which it would change what the recipe asked for.

    Returns:
        What validation added, as `ask_upstream` gives it.

    Raises:
        UserError: With upstream's own words, or the argument that it changes.
    """
    rows = ask_upstream(plan)
    for row in rows:
        if row.option:
            raise UserError(
                f"megatron-core changes it to {row.after}",
                field=row.option,
                value=row.before,
                fix=f"ask for {row.after} in the recipe, or change what makes Megatron do so",
            )
    return rows


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
        0 with what validation changed on stdout, or 1 with upstream's reason on stderr.
    """
    from megatron.training import arguments
    from megatron.training.argument_utils import hybrid_config_from_args

    from megacpp_stp.training.arguments import add_nam_arguments

    sys.argv[1:] = argv
    answer_for_an_h200(arguments)
    try:
        args = arguments.parse_args(extra_args_provider=add_nam_arguments)
        before = _texts(args)
        arguments.validate_args(args)
        after = _texts(args)
        # What the tokenizer would set; the launcher has compared it with the recipe.
        args.padded_vocab_size = args.padded_vocab_size or args.make_vocab_size_divisible_by
        hybrid_config_from_args(args)
        options = _options(argv)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or _failed_line(error)
        print(f"{_REFUSED}{reason}", file=sys.stderr)
        return 1
    print(_VERDICT + json.dumps(_changes(before, after, options=options)))
    return 0


def answer_for_an_h200(arguments: Any) -> None:
    """Upstream asks the GPU for its generation, and a process that only judges a plan needs none.

    Args:
        arguments: The module ``megatron.training.arguments``. What is put into it and into torch stays: for a process
            that runs nothing on any device.
    """
    import torch

    arguments.get_device_arch_version = lambda: _HOPPER[0]
    torch.cuda.get_device_capability = lambda device=None: _HOPPER


def _texts(args: Any) -> dict[str, str]:
    """Values as text; a list of one is the one, since upstream unpacks those."""
    values = {name: value for name, value in vars(args).items() if not name.startswith("_")}
    return {
        name: str(value[0] if isinstance(value, list) and len(value) == 1 else value) for name, value in values.items()
    }


def _options(argv: Sequence[str]) -> dict[str, str]:
    """The options in `argv`, by the name of the value that Megatron's parser gives each."""
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megacpp_stp.training.arguments import add_nam_arguments

    parser = add_nam_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    given = {token.split("=", 1)[0] for token in argv}
    found: dict[str, str] = {}
    for action in parser._actions:
        for option in action.option_strings:
            if option in given:
                if action.dest in found:
                    raise ValueError(f"{found[action.dest]} and {option} set the same value")
                found[action.dest] = option
    return found


def _changes(before: dict[str, str], after: dict[str, str], *, options: dict[str, str]) -> list[dict[str, str]]:
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [
        {"name": name, "before": before.get(name, ""), "after": after.get(name, ""), "option": options.get(name, "")}
        for name in names
    ]


def _failed_line(error: BaseException) -> str:
    """The source line of a bare assert."""
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {last.name}: {last.line}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
