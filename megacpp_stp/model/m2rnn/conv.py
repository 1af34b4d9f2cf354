"""The short convolution before the M2RNN recurrence.

Legend: s sequence, b batch, c taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of a convolution of each channel with its own taps, over this and earlier positions.

    Args:
        x: [s, b, channels].
        weight: [channels, 1, c].
        bias: [channels].

    Returns:
        [s, b, channels], in the dtype of x.
    """
    taps = weight.shape[-1]
    out = torch.nn.functional.conv1d(x.permute(1, 2, 0), weight, bias, padding=taps - 1, groups=x.shape[-1])
    return torch.nn.functional.silu(out[..., : x.shape[0]]).permute(2, 0, 1)
