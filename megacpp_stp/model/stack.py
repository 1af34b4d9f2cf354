"""The NAM decoder stack: Megatron's HybridStack with a final norm that the spec names, and what no backend has.

Legend: s sequence (a shard of it under sequence parallelism), b batch, h hidden.
"""

from __future__ import annotations

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig

from megacpp_stp.model.errors import BuildError


class NamStack(HybridStack):
    """One pipeline stage's layers: hidden states [s, b, h] in and out.

    Upstream builds the final norm from Transformer Engine whatever the spec says; here it comes from
    ``final_norm``.  HybridStack's own ``forward`` applies it, at the same point.

    Args:
        config: Megatron's configuration.
        submodules: One spec per layer symbol.
        final_norm: Builds the norm after the last layer of the last stage.
        post_layer_norm: Whether there is such a norm at all.
        kwargs: The rest of HybridStack's arguments, unchanged.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        final_norm: LayerNormBuilder,
        post_layer_norm: bool = True,
        **kwargs: object,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class AbsentLayer:
    """Stands in a spec for a layer that its backend does not have; upstream's default there is the identity.

    Args:
        symbol: Megatron's letter.
        what: The layer's name, with its article.

    Raises:
        BuildError: Always, when a pattern makes Megatron build it.
    """

    def __init__(self, *args: object, symbol: str, what: str, **kwargs: object) -> None:
        raise BuildError(
            f"{what} is in neither backend of the NAM stack",
            field="--hybrid-layer-pattern",
            value=symbol,
            fix="use a pattern without it",
        )
