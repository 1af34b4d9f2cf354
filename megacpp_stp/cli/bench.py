"""``bench``: speed and memory, measured where it runs."""

from __future__ import annotations

import platform
from typing import Annotated

import typer

from megacpp_stp.cli.options import Form, FormOption, print_json

app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed and memory."""


@app.command("plan")
def plan_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a .yaml file.")] = "nam56r",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds that are counted.")] = 11,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Also time check.")] = True,
    format: FormOption = Form.TABLE,
) -> None:
    """Time the planner as a whole process, beside importing the libraries that it is made of.

    Exit status 1 when a target is missed.
    """
    from megacpp_stp.bench.plan import LARGEST_RATIO, LONGEST_CHECK_S, measure

    found = measure(recipe, rounds=rounds, with_check=check)
    timings = {"import pydantic, yaml, typer": found.baseline, f"plan {recipe} --format argv": found.plan}
    if found.check is not None:
        timings[f"check {recipe}"] = found.check
    if format is Form.JSON:
        print_json(
            {
                "recipe": recipe,
                "python": platform.python_version(),
                "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
                "median_seconds": {name: timing.median for name, timing in timings.items()},
                "ratio": found.ratio,
                "targets": {"ratio": LARGEST_RATIO, "check_seconds": LONGEST_CHECK_S},
                "within_targets": found.within_targets,
            }
        )
    else:
        for name, timing in timings.items():
            print(f"{timing.median:8.3f} s  {name}  (median of {len(timing.seconds)})")
        print(f"{found.ratio:8.2f}    plan over imports; target: at most {LARGEST_RATIO}")
        if found.check is not None:
            print(f"check: target at most {LONGEST_CHECK_S:g} s")
    if not found.within_targets:
        raise typer.Exit(1)
