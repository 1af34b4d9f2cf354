"""The NAM stack of Transformer Engine's modules, as Megatron wraps them; ``--spec`` finds it in
`megacpp_stp.model.specs`.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.attention import SelfAttention

from megacpp_stp.model.stack_spec import Backend, stack_spec
from megacpp_stp.model.te_modules import TeMLASelfAttention, TeSparseAttention, TeStack, te_experts

nam_te_stack_spec = stack_spec(
    Backend(
        stack=TeStack,
        norm=TENorm,
        column=TEColumnParallelLinear,
        normed_column=TELayerNormColumnParallelLinear,
        row=TERowParallelLinear,
        latent=TELinear,
        core_attention=TEDotProductAttention,
        self_attention=SelfAttention,
        head_norm=None,
        mla=TeMLASelfAttention,
        # Transformer Engine has no sparse attention: the core is Megatron's own (dsa.py), whose kernel is an option.
        sparse=TeSparseAttention,
        indexer=TELinear,
        indexer_norm=TENorm,  # its builder makes the LayerNorm that the indexer asks for
        experts=te_experts,
    )
)
