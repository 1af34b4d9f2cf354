"""Parameters of the two backends under one name, that of the torch backend."""

from __future__ import annotations

import re

# A projection with the norm in it has the norm's weight too, in place of the layer's norm.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "mixer.in_proj.layer_norm_": "norm.",
}
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")


def torch_name(name: str) -> str:
    """The torch backend's name of a parameter of either."""
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return _GROUPED_EXPERT.sub(r".experts.local_experts.\2.\1.weight", name)
