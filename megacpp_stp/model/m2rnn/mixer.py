"""The M2RNN mixer, for Megatron's MambaLayer.

Legend: s sequence, b batch, h hidden, H heads, K key channels and V value channels of a head, c taps of the
convolution, C = 2 K + H V convolved channels, T ranks of the tensor-parallel group.  A parameter's shape is that of
the whole; each rank holds the T-th part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megacpp_stp.errors import UserError
from megacpp_stp.model.errors import BuildError
from megacpp_stp.model.m2rnn.conv import causal_conv
from megacpp_stp.model.m2rnn.gate import log_forget_gate
from megacpp_stp.model.m2rnn.gated_norm import gated_norm
from megacpp_stp.model.m2rnn.scan import CHECKPOINT_EVERY, m2rnn_scan
from megacpp_stp.model.precision import KeepsFp32
from megacpp_stp.model.projections import mixer_projections


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Channels on one tensor-parallel rank, in the order in which the input projection has them.

    Attributes:
        q: Of the query, one head of K shared by all; k likewise.
        v: Of the value, H V; the output gate g likewise.
        f: Of the forget gate, H.
    """

    q: int
    v: int
    f: int

    @property
    def convolved(self) -> list[int]:
        """q, k, v."""
        return [self.q, self.q, self.v]

    @property
    def projected(self) -> list[int]:
        """q, k, v, f, g."""
        return [*self.convolved, self.f, self.v]


class M2RNNMixer(KeepsFp32, MegatronModule):
    """Projection, short convolution, matrix recurrence, gated norm, projection: hidden states [s, b, h] in and out.

    ``q, k, v, f, g = W_in x``; q, k, v through a causal depthwise convolution and SiLU; the recurrence of
    `megacpp_stp.model.m2rnn.scan`; `megacpp_stp.model.m2rnn.gated_norm`; ``W_out``.  Sources: see
    `megacpp_stp.model.m2rnn.reference`.  The norm before it is the layer's, not the mixer's.

    Tensor parallelism cuts every parameter: v, f, g and what belongs to the state by heads, q and k, which all heads
    share, by channels, since projection and convolution treat each channel by itself.  Before the recurrence q and k
    are gathered, and the ranks' gradients of them summed on the way back.  So no parameter is held twice, and sequence
    parallelism is the two linear layers' affair.

    Parameters: in_proj.weight [2 K + 2 H V + H, h], conv_weight [C, 1, c], conv_bias [C], state_weight [H, V, V]
    (identity at first), A_log [H] and dt_bias [H] (fp32, see `KeepsFp32`), D [H V] and norm_weight [H V] (ones),
    out_proj.weight [h, H V].  D is flat because optimizers tell by the number of dimensions what to decay.

    Args:
        config: Megatron's configuration.
        submodules: ``in_proj`` and ``out_proj``: a column- and a row-parallel linear layer.
        d_model: h.
        num_heads: H.
        key_dim: K.
        value_dim: V.
        conv_kernel: c.
        checkpoint_every: Positions between the states that autograd keeps.
        scan: Computes the recurrence; with the arguments of `m2rnn_scan`.
        a_init_range: A is drawn uniformly from it, the lower end excluded.
        dt_init_range: softplus(dt_bias) is drawn from it, uniformly in its logarithm.
        layer_number: Global layer number, from 1.
        pg_collection: Process groups; ``tp`` is used.
        pp_layer_offset: Unused: MambaLayer passes it to a mixer.
        name: Of the module in the model.

    Raises:
        BuildError: A size is not positive, the ranks do not divide heads and key channels, or context parallelism.
    """

    fp32_parameters = ("A_log", "dt_bias")

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        *,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        conv_kernel: int,
        checkpoint_every: int = CHECKPOINT_EVERY,
        scan: Callable[..., tuple[Tensor, Tensor]] = m2rnn_scan,
        a_init_range: tuple[float, float] = (0.0, 16.0),
        dt_init_range: tuple[float, float] = (1e-3, 1e-1),
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        sizes = {
            "num_heads": num_heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "conv_kernel": conv_kernel,
            "checkpoint_every": checkpoint_every,
        }
        _refuse_layout(config, sizes, ranks=pg_collection.tp.size())
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.checkpoint_every, self.scan = checkpoint_every, scan
        ranks = self.tp_group.size()
        self.widths = Widths(q=key_dim // ranks, v=num_heads * value_dim // ranks, f=num_heads // ranks)
        self.in_proj, self.out_proj = mixer_projections(
            submodules,
            config,
            hidden_size=d_model,
            parts=self.widths.projected,
            inner=self.widths.v,
            tp_group=self.tp_group,
            name=name,
        )
        self._create_convolution(conv_kernel)
        self._create_recurrence(a_init_range, dt_init_range)

    def _create_convolution(self, taps: int) -> None:
        """As torch.nn.Conv1d initialises a depthwise one: all uniform within 1 / sqrt(c)."""
        bound = 1 / math.sqrt(taps)
        parts = [self._uniform(width, 1, taps) for width in self.widths.convolved]
        self.conv_weight = self._cut_parameter((2 * torch.cat(parts) - 1) * bound)
        parts = [self._uniform(width) for width in self.widths.convolved]
        self.conv_bias = self._cut_parameter((2 * torch.cat(parts) - 1) * bound)
        for parameter in (self.conv_weight, self.conv_bias):
            parameter.partition_sizes = self.widths.convolved

    def _create_recurrence(self, a_range: tuple[float, float], dt_range: tuple[float, float]) -> None:
        heads, v_dim = self.widths.f, self.value_dim
        # 1 - u is in (0, 1], so that A is never 0, whose logarithm is not finite.
        a = a_range[0] + (a_range[1] - a_range[0]) * (1 - self._uniform(heads))
        low, high = math.log(dt_range[0]), math.log(dt_range[1])
        dt = torch.exp(low + (high - low) * self._uniform(heads))
        self.A_log = self._cut_parameter(a.log(), dtype=torch.float32)
        # The inverse of softplus.
        self.dt_bias = self._cut_parameter(dt + torch.log(-torch.expm1(-dt)), dtype=torch.float32)
        self.state_weight = self._cut_parameter(torch.eye(v_dim, device=a.device).repeat(heads, 1, 1))
        self.D = self._cut_parameter(torch.ones(self.widths.v, device=a.device))
        self.norm_weight = self._cut_parameter(torch.ones(self.widths.v, device=a.device))

    def _uniform(self, rows: int, *shape: int) -> Tensor:
        """This rank's part of what all ranks draw together, uniform in [0, 1), fp32, [rows, *shape]."""
        if self.config.use_cpu_initialization:
            # All ranks draw the whole from the one stream, as Megatron's linear layers do, and each keeps its part.
            whole = torch.rand(rows * self.tp_group.size(), *shape, dtype=torch.float32)
            return whole[rows * self.tp_group.rank() :][:rows]
        with get_cuda_rng_tracker().fork():
            return torch.rand(rows, *shape, dtype=torch.float32, device=torch.cuda.current_device())

    def _cut_parameter(self, value: Tensor, *, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
        """A parameter of which this rank holds its part of dimension 0, in the model's dtype or the given one."""
        parameter = torch.nn.Parameter(value.to(self.config.params_dtype if dtype is None else dtype))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: object | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, None]:
        """Mix along the sequence.

        Args:
            hidden_states: [s, b, h], normalised; a shard of s under sequence parallelism.
            inference_context: Must be None.
            packed_seq_params: Must be None.

        Returns:
            The same shape and dtype, and no bias.

        Raises:
            UserError: Inference or packed sequences.
        """
        if inference_context is not None:
            raise UserError("M2RNN has no inference: its state is not kept between calls", field="inference_context")
        if packed_seq_params is not None:
            raise UserError("M2RNN has no packed sequences", fix="train on unpacked samples")
        projected, _ = self.in_proj(hidden_states)
        convolved, forget_input, gate = projected.split(
            [sum(self.widths.convolved), self.widths.f, self.widths.v], dim=-1
        )
        shared, value = causal_conv(convolved, self.conv_weight, self.conv_bias).split(
            [2 * self.widths.q, self.widths.v], dim=-1
        )
        query, key = _gather_pair(shared, self.tp_group)
        y, _ = self.scan(
            query,
            key,
            value.unflatten(-1, (-1, self.value_dim)),
            log_forget_gate(forget_input, self.A_log, self.dt_bias),
            self.state_weight,
            checkpoint_every=self.checkpoint_every,
        )
        eps = self.config.layernorm_epsilon
        normed = gated_norm(y.flatten(-2), value, gate, self.D, self.norm_weight, eps=eps, group=self.tp_group)
        output, _ = self.out_proj(normed)
        return output, None

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What inference asks of a mixer.

        Raises:
            UserError: Always.
        """
        raise UserError("M2RNN has no inference", fix="use a model without R blocks for it")

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """For distributed checkpoints, which any tensor-parallel size can load: q, k, v, f and g lie apart in them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            tensor_parallel_layers_axis_map=dict.fromkeys(own, 0),
            sharded_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            of_module = sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
            sharded.update(of_module)
        for name, widths in {
            "in_proj.weight": self.widths.projected,
            "conv_weight": self.widths.convolved,
            "conv_bias": self.widths.convolved,
        }.items():
            parts = list("qkvfg")[: len(widths)]
            sharded[f"{prefix}{name}"] = _split_tensor_factory(sharded[f"{prefix}{name}"], widths, parts, 0)
        return sharded


def _gather_pair(shared: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """q and k [s, b, K] from the part of each that this rank has, side by side: [s, b, 2 K / T].

    Every rank's heads read all of q and k, so the gradients of all ranks are summed on the way back.
    """
    whole = all_gather_last_dim_from_tensor_parallel_region(shared, group=group)
    of_ranks = whole.unflatten(-1, (group.size(), 2, -1))
    return of_ranks[..., 0, :].flatten(-2), of_ranks[..., 1, :].flatten(-2)


def _refuse_layout(config: TransformerConfig, sizes: dict[str, int], *, ranks: int) -> None:
    for field, size in sizes.items():
        if size < 1:
            raise BuildError("must be at least 1", field=field, value=size)
    for field in ("num_heads", "key_dim"):
        if sizes[field] % ranks:
            raise BuildError(
                f"cannot be cut over {ranks} tensor-parallel ranks",
                field=field,
                value=sizes[field],
                fix="use a multiple of --tensor-model-parallel-size",
            )
    if config.context_parallel_size > 1:
        raise BuildError(
            "M2RNN has no context parallelism: its state passes from each position to the next",
            field="--context-parallel-size",
            value=config.context_parallel_size,
            fix="use 1",
        )
