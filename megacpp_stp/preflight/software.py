"""Judging what is installed: Python, torch and its CUDA, megatron-core, optional kernels, and whose apex."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megacpp_stp.patches.upstream import SUPPORTED
from megacpp_stp.plan.kernels import KERNEL_PACKAGES
from megacpp_stp.preflight.case import Case
from megacpp_stp.preflight.finding import Finding, fine, refused, warning
from megacpp_stp.preflight.machine import UNKNOWN
from megacpp_stp.recipe.schema import Recipe

TORCH = ">=2.11"
"""What pyproject.toml asks for."""
INSTALL_TRAIN = "pip install 'megacpp-stp[train]'"
INSTALL_TE = "pip install --no-build-isolation 'megacpp-stp[te]'"
INSTALL_SSM = "pip install --no-build-isolation 'megacpp-stp[ssm]'"

_TRAINING = "`check`, `launch`, `data prepare` and `bench` need it; planning does not"
REQUIRED = {
    "torch": TORCH,
    "megatron-core": SUPPORTED,
    "transformers": "",
    "tokenizers": ">=0.20",
    "triton": ">=3.2",
}
"""What a run needs, and which versions."""
_INSTALL_CUT = "pip install 'cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy'"
_MAMBA2, _DSA = "model.families.M.block", "megatron.dsa-kernel-backend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What may need a package.

    Attributes:
        field: The recipe key that asks for it.
        values: The values of that key that do.
        fix: How to get the package.
    """

    field: str
    values: str
    fix: str

    def is_in(self, recipe: Recipe) -> bool:
        """Whether a recipe has it."""
        return _value(recipe, self.field) == self.values


def _value(recipe: Recipe, field: str) -> object:
    """Of a key, by its path; None where the recipe has no such section."""
    found: object = recipe
    for name in field.split("."):
        found = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
    return found


def _of_kernel(kernel: str) -> Use:
    needed = KERNEL_PACKAGES[kernel]
    return Use(field=needed.field, values=needed.kernel, fix=needed.fix)


_OPTIONAL = {
    "transformer-engine": (Use(field="model.backend", values="te", fix=INSTALL_TE),),
    "mamba-ssm": (Use(field=_MAMBA2, values="mamba2", fix=INSTALL_SSM), _of_kernel("mamba-ssm")),
    "causal-conv1d": (Use(field=_MAMBA2, values="mamba2", fix=INSTALL_SSM),),
    "accelerated-model-architectures": (_of_kernel("xma"),),
    "cut-cross-entropy": (Use(field="training.fused_cross_entropy", values="cut-cross-entropy", fix=_INSTALL_CUT),),
    "tilelang": (Use(field=_DSA, values="tilelang", fix="pip install tilelang"),),
    "nvidia-cudnn-frontend": (Use(field=_DSA, values="cudnn", fix="pip install nvidia-cudnn-frontend"),),
    "flash-mla": (
        Use(field=_DSA, values="cudnn", fix="install FlashMLA from its source (deepseek-ai/FlashMLA on GitHub)"),
    ),
}
"""What some recipes need, by each key that may ask for it. Triton every run needs."""


def check_software(case: Case) -> Iterator[Finding]:
    """Python, and each package that a run needs or may need."""
    yield _python(case)
    for name, versions in REQUIRED.items():
        yield _required(case, name, versions)
    yield _imported(case)
    for name in _OPTIONAL:
        yield _optional(case, name)
    yield _apex(case)


def _python(case: Case) -> Finding:
    found = f"{case.machine.python} on {case.machine.system}"
    if case.machine.system.startswith("Linux"):
        return fine("Python", found)
    fix = "train on Linux"
    if case.plan is None:
        return warning("Python", found, why="planning works; training was never tried here", fix=fix)
    return refused("Python", found, why="triton and Megatron's dataset helpers are built for Linux alone", fix=fix)


def _required(case: Case, name: str, versions: str) -> Finding:
    judge = warning if case.plan is None else refused
    found = case.machine.packages.get(name)
    if found is None:
        return judge(name, "not installed", why=_TRAINING, fix=INSTALL_TRAIN)
    if not _is_in(found, versions):
        return judge(name, found, why=f"must be {versions}: {_TRAINING}", fix=INSTALL_TRAIN)
    return fine(name, found, f"{versions} is supported" if versions else "")


def _is_in(found: str, versions: str) -> bool:
    """By release alone: NVIDIA's containers have early builds of the next one, as 2.12.0a0+nv26.1."""
    try:
        return Version(found).base_version in SpecifierSet(versions)
    except InvalidVersion:
        return False


def _imported(case: Case) -> Finding:
    machine = case.machine
    if machine.torch_error is not None:
        judge = warning if case.plan is None else refused
        return judge(
            "import torch", machine.torch_error, why=_TRAINING, fix="install torch anew, for this system and its CUDA"
        )
    if "torch" not in machine.packages:
        return fine("import torch", "not tried: not installed")
    return fine("import torch", "not tried" if machine.usable is None else "works")


def _optional(case: Case, name: str) -> Finding:
    uses = _OPTIONAL[name]
    found, needed = case.machine.packages.get(name), _needed(case, name)
    what_for = " or ".join(f"{use.field} {use.values}" for use in uses)
    if found is not None:
        return fine(name, found, f"for {what_for}")
    if needed is not None:
        why = f"this recipe needs it, for {needed.field} {needed.values}"
        return refused(name, f"{name} is not installed", why=why, fix=needed.fix, field=needed.field)
    if case.plan is None:
        return fine(name, "not installed", f"rules out {what_for}; to mend: {uses[0].fix}")
    return fine(name, "not installed", "this recipe does not need it")


def _needed(case: Case, name: str) -> Use | None:
    """The first thing in the recipe that needs a package; None for none. CPUs have no kernels."""
    if case.plan is None or not case.on_gpu:
        return None
    recipe = case.plan.recipe
    return next((use for use in _OPTIONAL[name] if use.is_in(recipe)), None)


def _apex(case: Case) -> Finding:
    version = case.machine.packages.get("apex", UNKNOWN)
    if case.machine.apex is None:
        return fine("apex", "not installed", "nothing here needs it")
    if case.machine.apex == "NVIDIA's":
        return fine("apex", f"NVIDIA's, {version}")
    return warning(
        "apex",
        f"another project's, {version}",
        why="PyPI's apex is no NVIDIA apex: Megatron imports it for one, and ends with whatever that raises",
        fix="pip uninstall apex",
    )
