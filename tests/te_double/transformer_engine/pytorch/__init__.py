"""The modules that Megatron wraps, on the CPU.

Legend: s sequence, b batch, n query heads, g key/value heads, d channels of queries and keys, v of values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, pad, rms_norm, scaled_dot_product_attention
from transformer_engine.pytorch import distributed, fp8
from transformer_engine.pytorch.fp8 import fp8_autocast

__all__ = ["DotProductAttention", "GroupedLinear", "LayerNorm", "LayerNormLinear", "Linear", "RMSNorm"]
__all__ += ["Fp8Padding", "Fp8Unpadding", "distributed", "fp8", "fp8_autocast"]


class _Stateful(torch.nn.Module):
    """The real modules have an extra state, empty without fp8; checkpoints have an entry for it."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        pass


class _Linear(_Stateful):
    def __init__(
        self, features: tuple[int, int], *, tp_size: int, parallel_mode: str | None, bias: bool, numbered: int | None
    ) -> None:
        super().__init__()
        assert not bias, "the double has no bias"
        self.in_features, self.out_features = features
        if parallel_mode == "column":
            self.out_features //= tp_size
        elif parallel_mode == "row":
            self.in_features //= tp_size
        self.tp_size, self.parallel_mode = tp_size, parallel_mode
        self.save_original_input = False  # Megatron sets it where another product reads the same input
        self._names = ["weight"] if numbered is None else [f"weight{number}" for number in range(numbered)]

    def _fill(self, init_method: Callable[[Tensor], object] | None, dtype: torch.dtype | None, device: object) -> None:
        for name in self._names:
            shape = (self.out_features, self.in_features)
            weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=_device(device)))
            self.register_parameter(name, weight)
            if weight.is_meta:
                continue
            if init_method is not None:
                init_method(weight)
            weight.tensor_model_parallel = True  # as the real one marks it in every mode
            weight.partition_dim, weight.partition_stride = (1 if self.parallel_mode == "row" else 0), 1

    def _computes(self, rows: Tensor) -> None:
        """Before each product: what fp8 asks of its sizes, and in which region it is."""
        assert self.tp_size == 1, "the double computes on one rank"
        self.recipe = fp8.FP8GlobalStateManager.recipes[-1] if fp8.FP8GlobalStateManager.recipes else None
        if self.recipe is not None:  # as the real one, and both products of backward
            assert self.in_features % 16 == self.out_features % 16 == rows.shape[:-1].numel() % 16 == 0


class Linear(_Linear):
    """``x W^T``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: object = None,
        tp_size: int = 1,
        get_rng_state_tracker: object = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], object] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: object = "cuda",
    ) -> None:
        super().__init__(
            (in_features, out_features), tp_size=tp_size, parallel_mode=parallel_mode, bias=bias, numbered=None
        )
        self._fill(init_method, params_dtype, device)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        self._computes(inp)
        return linear(inp, self.weight)


class LayerNormLinear(_Linear):
    """``norm(x) W^T``; both parameters are its own."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: object = None,
        tp_size: int = 1,
        get_rng_state_tracker: object = None,
        init_method: Callable[[Tensor], object] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: object = "cuda",
    ) -> None:
        super().__init__(
            (in_features, out_features), tp_size=tp_size, parallel_mode=parallel_mode, bias=bias, numbered=None
        )
        assert normalization == "RMSNorm" and not zero_centered_gamma and not return_layernorm_output
        self.eps = eps
        ones = torch.ones(in_features, dtype=params_dtype, device=_device(device))
        self.layer_norm_weight = torch.nn.Parameter(ones)
        self.layer_norm_weight.sequence_parallel = sequence_parallel and tp_size > 1
        self._fill(init_method, params_dtype, device)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        self._computes(inp)
        return linear(_rms(inp, self.layer_norm_weight, self.eps), self.weight)


class GroupedLinear(_Linear):
    """Rows of x in groups, each times its own weight."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: object = None,
        tp_size: int = 1,
        get_rng_state_tracker: object = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], object] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: object = "cuda",
        ub_name: str | None = None,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
    ) -> None:
        super().__init__(
            (in_features, out_features), tp_size=tp_size, parallel_mode=parallel_mode, bias=bias, numbered=num_gemms
        )
        assert not single_grouped_weight and not single_grouped_bias
        self.num_gemms, self.use_bias = num_gemms, bias
        # What Megatron reads to cut the extra state into one of each expert.
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        self._fill(init_method, params_dtype, device)

    def forward(self, inp: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None) -> Tensor:
        self._computes(inp)
        groups = zip(inp.split([int(rows) for rows in m_splits]), self._names, strict=True)
        return torch.cat([linear(rows, self.get_parameter(name)) for rows, name in groups])


class Fp8Padding(torch.nn.Module):
    """Rows of zeros after each group, up to a size that fp8 has products for."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.align_size = align_size or 16

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        sizes = [-rows % self.align_size + rows for rows in m_splits]
        groups = zip(inp.split(m_splits), sizes, strict=True)
        return torch.cat([pad(rows, (0, 0, 0, size - rows.shape[0])) for rows, size in groups]), sizes


class Fp8Unpadding(Fp8Padding):
    """And off again."""

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        sizes = [-rows % self.align_size + rows for rows in m_splits]
        return torch.cat([rows[:size] for rows, size in zip(inp.split(sizes), m_splits, strict=True)])


class _Norm(_Stateful):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: object = "cuda",
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=_device(device)))
        self.weight.sequence_parallel = sequence_parallel


class RMSNorm(_Norm):
    """``x / sqrt(mean(x^2) + eps) * weight``."""

    def forward(self, inp: Tensor) -> Tensor:
        return _rms(inp, self.weight, self.eps)


class LayerNorm(_Norm):
    """``(x - mean) / sqrt(var + eps) * weight + bias``."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(normalized_shape, eps, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        self.bias.sequence_parallel = self.weight.sequence_parallel

    def forward(self, inp: Tensor) -> Tensor:
        compute = torch.promote_types(inp.dtype, torch.float32)
        weight, bias = self.weight.to(compute), self.bias.to(compute)
        return layer_norm(inp.to(compute), self.weight.shape, weight, bias, self.eps).to(inp.dtype)


class DotProductAttention(torch.nn.Module):
    """Causal attention, [s, b, n, d] to [s, b, n v]."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: object = None,
        tp_group: object = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == "causal" and attention_type == "self" and not attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: object, attn_mask_type: str
    ) -> Tensor:
        assert attention_mask is None and attn_mask_type == "causal"
        s, b, n, _ = query_layer.shape
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query_layer, key_layer, value_layer))
        grouped = k.shape[1] != n
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)


def _device(device: object) -> Any:
    # What Megatron asks for, a GPU by its number or the CPU, is what is there: the default device.
    return None if isinstance(device, int) or device in ("cuda", "cpu") else device


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    return rms_norm(x.to(compute), weight.shape, weight.to(compute), eps).to(x.dtype)
