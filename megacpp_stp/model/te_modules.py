"""What the stack of Transformer Engine modules has of its own: refusals, and the choice of the experts' class.

Everything that computes is Megatron's: its wrappers of Transformer Engine's modules, and its layers around them.  This
imports without Transformer Engine, as Megatron does, so that arguments can be checked on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import AbsorbedMLASelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megacpp_stp.model.attention import refuse_latent_attention
from megacpp_stp.model.errors import BuildError
from megacpp_stp.model.stack import NamStack


def require_transformer_engine() -> None:
    """Refuse where Megatron has not found Transformer Engine.

    Raises:
        BuildError: It is not installed, or cannot be imported; Megatron then goes on without it.
    """
    if HAVE_TE:
        return
    try:
        import_module("transformer_engine.pytorch")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "transformer_engine"
        problem = "is not installed" if absent else f"cannot be imported: {error}"
    else:
        problem = "is a version that Megatron cannot use"
    raise BuildError(
        f"Transformer Engine {problem}",
        field="model.backend",
        value="te",
        fix="pip install --no-build-isolation 'megacpp-stp[te]', or use backend torch",
    )


class TeStack(NamStack):
    """The NAM stack of Transformer Engine modules; nothing of it is built without Transformer Engine.

    In an fp8 model, the layers that ``--nam-bf16-layers`` names compute their products in bf16.

    Raises:
        BuildError: Transformer Engine is missing, or an option that would put other classes in the spec's place.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        require_transformer_engine()
        if getattr(config, "mla_down_proj_fusion", False):
            raise BuildError(
                "fusing MLA's down-projections takes another class than the NAM stack's",
                field="--mla-down-proj-fusion",
                fix="leave it out",
            )
        super().__init__(config, *args, **kwargs)
        numbers = _bf16_layers() if config.fp8 else ()
        for layer in self.layers if numbers else ():
            if layer.layer_number in numbers:
                layer.forward = _without_fp8(layer.forward)


def _bf16_layers() -> tuple[int, ...]:
    from megatron.training import get_args

    return getattr(get_args(), "nam_bf16_layers", None) or ()


def _without_fp8(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward outside of the fp8 region around it; recomputation calls it again, and the same holds."""
    fp8_autocast = import_module("transformer_engine.pytorch").fp8_autocast

    @wraps(forward)
    def in_bf16(*args: Any, **kwargs: Any) -> Any:
        with fp8_autocast(enabled=False):
            return forward(*args, **kwargs)

    return in_bf16


class TeMLASelfAttention(MLASelfAttention):
    """Megatron's multi-latent attention with a norm on each latent.

    Raises:
        BuildError: See `megacpp_stp.model.attention.refuse_latent_attention`.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        refuse_latent_attention(config)
        super().__init__(config, *args, **kwargs)


class TeSparseAttention(AbsorbedMLASelfAttention):
    """Megatron's absorbed MLA with a norm on each latent, and its DSA in the core.

    Raises:
        BuildError: See `TeMLASelfAttention`; and dropout, which sparse attention would leave out.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        refuse_latent_attention(config)
        if config.attention_dropout:
            raise BuildError(
                "sparse attention has no dropout",
                field="--attention-dropout",
                value=config.attention_dropout,
                fix="pass --attention-dropout 0.0",
            )
        super().__init__(config, *args, **kwargs)


def te_experts(config: TransformerConfig, **kwargs: Any) -> Any:
    """Megatron's mixture of experts: their products grouped with ``--moe-grouped-gemm``, else one expert at a time.

    Upstream's own hybrid spec groups them whatever the option says.
    """
    # num_experts only says "there are experts": their number is the configuration's.
    spec = get_moe_module_spec(use_te=True, num_experts=1, moe_grouped_gemm=config.moe_grouped_gemm)
    return spec(config=config, **kwargs)
