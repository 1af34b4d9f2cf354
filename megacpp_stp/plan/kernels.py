"""What kernels need that a recipe names: a GPU, a package, sizes that they take.

Facts of the authors' kernels are from their sources: ``mamba_ssm/ops/triton/mamba3`` of state-spaces/mamba (2.3.2), and
``xma/layers/m2rnn`` of open-lm-engine/accelerated-model-architectures (XMA).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megacpp_stp.errors import UserError
from megacpp_stp.recipe.blocks import M2rnn, Mamba3, Mla
from megacpp_stp.recipe.schema import Recipe

_M, _R = "model.families.M", "model.families.R"
_SMALLEST_TILE = 16
"""Of a tensor core's product in Triton, in each dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """A package that a recipe's kernel runs from.

    Attributes:
        field: Recipe field that names the kernel.
        kernel: Its value.
        package: Top-level package.
        module: File below it that has the kernel; other packages and versions of that name lack it.
        fix: How to get it.
    """

    field: str
    kernel: str
    package: str
    module: str
    fix: str


KERNEL_PACKAGES = {
    "mamba-ssm": Needed(
        field=f"{_M}.kernel",
        kernel="mamba-ssm",
        package="mamba_ssm",
        module="ops/triton/mamba3/mamba3_siso_combined.py",
        fix="pip install --no-build-isolation 'megacpp-stp[ssm]', or use kernel torch",
    ),
    "triton": Needed(
        field=f"{_R}.kernel",
        kernel="triton",
        package="triton",
        module="language/core.py",
        fix="install the Triton of this torch, or use kernel torch",
    ),
    "xma": Needed(
        field=f"{_R}.kernel",
        kernel="xma",
        package="xma",
        module="layers/m2rnn/op.py",
        fix="install XMA from its source (open-lm-engine/accelerated-model-architectures on GitHub; the package that "
        "is called xma on PyPI is another project), or use kernel triton",
    ),
}
"""By kernel."""


def kernel_packages(recipe: Recipe) -> Iterator[Needed]:
    """The packages that the recipe's kernels run from, beside torch."""
    families = recipe.model.families
    for block in (families.M, families.R):
        if isinstance(block, Mamba3 | M2rnn) and block.kernel != "torch":
            yield KERNEL_PACKAGES[block.kernel]


def check_kernels(recipe: Recipe, *, device: str) -> None:
    """Refuse kernels that cannot run what the recipe says, on that device.

    Args:
        recipe: The resolved recipe.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: The first thing that does not fit.
    """
    for needed in kernel_packages(recipe):
        if device == "cpu":
            raise UserError(
                "its kernels run on GPUs only",
                field=needed.field,
                value=needed.kernel,
                fix="use --device cuda, or kernel torch",
            )
    block = recipe.model.families.M
    if isinstance(block, Mamba3) and block.kernel == "mamba-ssm":
        _check_mamba_ssm(recipe, block)


def _check_mamba_ssm(recipe: Recipe, block: Mamba3) -> None:
    if recipe.training.precision != "bf16":
        raise UserError(
            "rounds its inputs to bf16, whatever they are",
            field=f"{_M}.kernel",
            value="mamba-ssm",
            fix="use training.precision bf16, or kernel torch",
        )
    if block.mimo_rank > 1:
        raise UserError(
            "above 1 has other kernels in mamba-ssm (TileLang's), which nothing here calls yet: they "
            "rotate other pairs of channels, and their backward, as released, takes 1 group or 1 a head",
            field=f"{_M}.mimo_rank",
            value=block.mimo_rank,
            fix="use kernel torch, or mimo_rank 1",
        )
    for name in ("head_dim", "state_dim", "chunk_size"):
        size = getattr(block, name)
        if size < _SMALLEST_TILE or size & (size - 1):
            raise UserError(
                f"kernel mamba-ssm takes powers of 2 from {_SMALLEST_TILE}",
                field=f"{_M}.{name}",
                value=size,
                fix="use one, or kernel torch",
            )
    heads, length = block.heads // recipe.parallel.tensor, recipe.training.sequence_length
    if heads % 4 and length % 4:
        raise UserError(
            f"the backward kernel of mamba-ssm reads misaligned addresses with {heads} heads a rank at this length "
            "(state-spaces/mamba, issue 886)",
            field="training.sequence_length",
            value=length,
            fix="use a multiple of 4, or a multiple of 4 heads a rank, or kernel torch",
        )


def check_sparse(recipe: Recipe) -> None:
    """Refuse kernels of sparse attention that contradict each other, or that upstream would not take.

    Raises:
        UserError: The option that does.
    """
    sparse = block.sparse if isinstance(block := recipe.model.families.A, Mla) else None
    if sparse is None:
        return
    assert isinstance(block, Mla)
    if sparse.kernel == "upstream":
        _check_fused_sparse(recipe, block)
        return
    for option, value in recipe.megatron.items():
        if option == "dsa-kernel-backend" or (option, value) == ("attention-backend", "unfused"):
            raise UserError(
                f"names other kernels than model.families.A.sparse.kernel, {sparse.kernel}",
                field=f"megatron.{option}",
                value=value,
                fix="leave it out, or set the kernel to upstream",
            )


def _check_fused_sparse(recipe: Recipe, block: Mla) -> None:
    """Refuse upstream's fused kernels where upstream would leave them for its plain path without a word.

    Sources: ``tilelang_dsa.py`` (576 channels of a query, 512 of a value) and ``dsa_cudnn_kernels.py`` (512 of a value)
    of megatron-core 0.19.2.
    """
    backend = recipe.megatron.get("dsa-kernel-backend", "none")
    if backend == "none":
        return
    width, rotary = block.kv_lora_rank, block.qk_pos_emb_head_dim
    if width != 512 or (backend == "tilelang" and rotary != 64):
        needs = "512 and qk_pos_emb_head_dim 64" if backend == "tilelang" else "512"
        raise UserError(
            f"is for kv_lora_rank {needs}; here they are {width} and {rotary}, and upstream would take its plain path",
            field="megatron.dsa-kernel-backend",
            value=backend,
            fix="leave it out, and set model.families.A.sparse.kernel to chunked",
        )
