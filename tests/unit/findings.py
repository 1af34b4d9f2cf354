"""Plans, and what a check of preflight finds of them."""

from __future__ import annotations

from megacpp_stp.plan import build_plan
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Verdict
from megacpp_stp.recipe import load_recipe

FINE, WARNING, REFUSED = Verdict.FINE, Verdict.WARNING, Verdict.REFUSED


def planned(*overrides, device="cuda", recipe="nam56r-tiny"):
    return build_plan(load_recipe(recipe, overrides), device=device)


CPU = build_plan(load_recipe("nam56r-tiny"), device="cpu")
CUDA = build_plan(load_recipe("nam56r-tiny"), device="cuda")
BF16 = ("training.precision=bf16", "training.checkpoint=null")
LARGE = build_plan(load_recipe("nam56r"), device="cuda")


def found(check, machine, plan=None, **more):
    """Findings of one check, by name."""
    return {finding.name: finding for finding in check(Case(machine=machine, plan=plan, **more))}


def verdicts(check, machine, plan=None, **more):
    return {name: finding.verdict for name, finding in found(check, machine, plan, **more).items()}
