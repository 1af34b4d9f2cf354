"""The Mamba-3 mixer that Megatron's MambaLayer hosts, on plain torch.

Source: ``mamba_ssm/modules/mamba3.py`` of state-spaces/mamba, single or multiple inputs and outputs of a head, without
a norm before the output projection.  Parameters have its names; the rows that make rotation rates are a projection of
their own, since they are the one part that tensor parallelism does not cut, and the rows of B and C lie group by group
instead of input by input, so that it can cut them.

Legend: s sequence, b batch, h hidden, H heads, P channels of a head, G groups, N state channels, S rotated pairs, R
inputs and outputs of a head at each step, T tensor-parallel size; H and G are of the whole layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor
from torch.nn.functional import linear, rms_norm, softplus

from megacpp_stp.errors import UserError
from megacpp_stp.model.mamba3.chunked import CHUNK_SIZE, chunked_scan
from megacpp_stp.model.mamba3.inputs import ScanInputs
from megacpp_stp.model.mamba3.reference import DECAY_FLOOR, NORM_EPS
from megacpp_stp.model.mamba3.sizes import Mamba3Sizes, refuse_what_is_missing
from megacpp_stp.model.precision import KeepsFp32
from megacpp_stp.model.projections import mixer_projections

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4


class Mamba3Mixer(KeepsFp32, MegatronModule):
    """Megatron's mixer contract: [s, b, h] in, ([s, b, h], None) out; s a shard under sequence parallelism.

    Heads and groups are cut over tensor-parallel ranks.  B_norm, C_norm and angle_proj are whole on every rank: the
    gradients of the norms come out summed over the ranks, angle_proj's as Megatron expects of a weight marked
    ``sequence_parallel`` under sequence parallelism, and whole without it.

    dt_bias, B_bias, C_bias, D, and with R > 1 mimo_x, mimo_z and mimo_o are fp32 and stay so when the model is cast
    (`KeepsFp32`).  B_bias and C_bias are [H, N], or [H, R, N] with R > 1, and mimo_x, mimo_z, mimo_o [H, R, P].

    Initial values are upstream's: B_bias, C_bias, D, mimo_z and the norms 1, mimo_x and mimo_o 1 / R, softplus(dt_bias)
    log-uniform in [0.001, 0.1].
    The projections take the configuration's ``init_method`` and ``output_layer_init_method``, as Megatron's own mixer
    does.

    Args:
        config: Megatron's configuration; ``mamba_num_heads``, ``mamba_head_dim``, ``mamba_state_dim`` and
            ``mamba_num_groups`` size the layer.
        submodules: The projections.
        d_model: h.
        chunk_size: Steps of a chunk of the scan; changes speed and memory, not the result.
        rope_fraction: Share of the state channels that rotate: 0 for none, 0.5 or 1 as upstream.
        mimo_rank: R; 1 for SISO.
        scan: Computes the recurrence; with the arguments of `chunked_scan`.
        layer_number: Of the layer, counted from 1 through all stages.
        pg_collection: Process groups; tp and cp are needed.
        pp_layer_offset: Unused; part of the contract.
        name: For the projections.

    Raises:
        BuildError: Sizes that do not fit or divide, context parallelism, or an option that would be ignored.
    """

    fp32_parameters: tuple[str, ...] = ("dt_bias", "B_bias", "C_bias", "D")

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules | None = None,
        d_model: int | None = None,
        *,
        chunk_size: int = CHUNK_SIZE,
        rope_fraction: float = 0.0,
        mimo_rank: int = 1,
        scan: Callable[..., Tensor] = chunked_scan,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        assert pg_collection is not None, "Megatron passes the process groups"
        refuse_what_is_missing(config, context_parallel=pg_collection.cp.size(), chunk_size=chunk_size)
        submodules = submodules or MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
        d_model = config.hidden_size if d_model is None else d_model
        self.tp_group = pg_collection.tp
        self.sizes = Mamba3Sizes.of(
            config, rope_fraction=rope_fraction, mimo_rank=mimo_rank, tensor_parallel=self.tp_group.size()
        )
        self.chunk_size, self.scan = chunk_size, scan
        self.layer_number = layer_number
        self.sequence_parallel = config.sequence_parallel and self.tp_group.size() > 1

        self.in_proj, self.out_proj = mixer_projections(
            submodules,
            config,
            hidden_size=d_model,
            parts=list(self.sizes.parts.values()),
            inner=self.sizes.heads * self.sizes.head_dim,
            tp_group=self.tp_group,
            name=name,
        )
        self._create_small_parameters(config, d_model)

    def _create_small_parameters(self, config: TransformerConfig, d_model: int) -> None:
        sizes = self.sizes
        heads = sizes.heads * self.tp_group.size()
        biases = (heads, sizes.state) if sizes.rank == 1 else (heads, sizes.rank, sizes.state)
        self.dt_bias = self._of_my_heads(_initial_dt_bias(heads))
        self.B_bias = self._of_my_heads(torch.ones(biases))
        self.C_bias = self._of_my_heads(torch.ones(biases))
        self.D = self._of_my_heads(torch.ones(heads))
        self.mimo_x: torch.nn.Parameter | None = None
        self.mimo_z: torch.nn.Parameter | None = None
        self.mimo_o: torch.nn.Parameter | None = None
        if sizes.rank > 1:
            ones = torch.ones(heads, sizes.rank, sizes.head_dim)
            self.mimo_x = self._of_my_heads(ones / sizes.rank)
            self.mimo_z = self._of_my_heads(ones)
            self.mimo_o = self._of_my_heads(ones / sizes.rank)
            self.fp32_parameters = (*self.fp32_parameters, "mimo_x", "mimo_z", "mimo_o")
        self.B_norm = StateNorm(sizes.state, dtype=config.params_dtype, tp_group=self.tp_group)
        self.C_norm = StateNorm(sizes.state, dtype=config.params_dtype, tp_group=self.tp_group)
        self.angle_proj = None
        if sizes.pairs:
            self.angle_proj = torch.nn.Linear(d_model, sizes.pairs, bias=False, dtype=config.params_dtype)
            if config.perform_initialization:
                config.init_method(self.angle_proj.weight)
            self.angle_proj.weight.sequence_parallel = self.sequence_parallel

    def _of_my_heads(self, whole: Tensor) -> torch.nn.Parameter:
        """This rank's part of a parameter of all heads, [H, ...] to [H / T, ...]."""
        mine = whole.chunk(self.tp_group.size())[self.tp_group.rank()].clone()
        parameter = torch.nn.Parameter(mine.to(torch.float32))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def forward(
        self, hidden_states: Tensor, inference_context: object = None, *, packed_seq_params: object = None
    ) -> tuple[Tensor, None]:
        """Mix along the sequence.

        Args:
            hidden_states: [s, b, h]; a shard of s under sequence parallelism.
            inference_context: Must be None.
            packed_seq_params: Must be None.

        Returns:
            [s, b, h] in the dtype of the input, cut as it was; and None, for there is no bias.

        Raises:
            UserError: Inference with a cache, or packed sequences.
        """
        if inference_context is not None:
            raise UserError("Mamba-3 has no inference with a cache", fix="run the whole sequence at once")
        if packed_seq_params is not None:
            raise UserError("Mamba-3 has no packed sequences", fix="train on unpacked samples")
        projected, _ = self.in_proj(hidden_states)
        inputs = self._scan_inputs(projected, self._angle(hidden_states))
        y = self.scan(inputs, chunk_size=self.chunk_size)
        out, _ = self.out_proj(y.flatten(2))
        return out, None

    def _scan_inputs(self, projected: Tensor, angle: Tensor | None) -> ScanInputs:
        """Of the packed projection [s, b, sum of parts], s whole."""
        dtype = torch.promote_types(projected.dtype, torch.float32)
        sizes = self.sizes
        part = dict(zip(sizes.parts, projected.split(list(sizes.parts.values()), dim=-1), strict=True))
        dt = softplus(part["dt"].to(dtype) + self.dt_bias.to(dtype))
        A = torch.clamp(-softplus(part["A"].to(dtype)), max=-DECAY_FLOOR)
        keys = (sizes.groups, sizes.state) if sizes.rank == 1 else (sizes.groups, sizes.rank, sizes.state)
        return ScanInputs(
            x=part["x"].unflatten(-1, (sizes.heads, sizes.head_dim)),
            z=part["z"].unflatten(-1, (sizes.heads, sizes.head_dim)),
            B=self.B_norm(part["B"].unflatten(-1, keys)),
            C=self.C_norm(part["C"].unflatten(-1, keys)),
            dt=dt,
            log_decay=A * dt,
            trap=torch.sigmoid(part["trap"].to(dtype)),
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            D=self.D,
            angle=angle,
            mimo_x=self.mimo_x,
            mimo_z=self.mimo_z,
            mimo_o=self.mimo_o,
        )

    def _angle(self, hidden_states: Tensor) -> Tensor | None:
        """Rotation rates [s, b, S] of the whole sequence, for this rank's heads.

        Every rank makes the same rates, but each has the gradient of its own heads only; both ways of handing them
        on sum it.
        """
        if self.angle_proj is None:
            return None
        angle = linear(hidden_states, self.angle_proj.weight)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(angle, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(angle, group=self.tp_group)

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of an inference cache.

        Raises:
            UserError: Always: there is none.
        """
        raise UserError("Mamba-3 has no inference with a cache", fix="run the whole sequence at once")

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, object]:
        """The state for a distributed checkpoint, which loads at any tensor-parallel size that the layer has.

        in_proj is stored part by part, ``in_proj.weight.z`` and so on, each cut for itself.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, object] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(self.fp32_parameters, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded.update(
                sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata, self.tp_group)
            )
        in_proj = f"{prefix}in_proj.weight"
        parts = self.sizes.parts
        sharded[in_proj] = _split_tensor_factory(sharded[in_proj], list(parts.values()), list(parts), 0)
        return sharded


class StateNorm(torch.nn.Module):
    """RMSNorm over the N channels of each group's key or query, one weight for all groups.

    Computed in fp32 (fp64 for fp64) and cast back.  Each tensor-parallel rank norms its own groups; the weight's
    gradient is summed over the ranks in the backward pass.

    Args:
        size: N.
        dtype: Of the weight.
        tp_group: Tensor-parallel ranks.
    """

    def __init__(self, size: int, *, dtype: torch.dtype, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
        self.tp_group = tp_group

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``x`` ([..., N]); same shape and dtype out."""
        compute = torch.promote_types(x.dtype, torch.float32)
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group).to(compute)
        return rms_norm(x.to(compute), weight.shape, weight, NORM_EPS).to(x.dtype)


def _initial_dt_bias(heads: int) -> Tensor:
    """[heads]: softplus of it is log-uniform in [0.001, 0.1]; drawn for all heads, alike on all ranks of a layer."""
    drawn = torch.rand(heads, dtype=torch.float32)
    dt = torch.exp(drawn * (math.log(_DT_MAX) - math.log(_DT_MIN)) + math.log(_DT_MIN)).clamp(min=_DT_FLOOR)
    # The inverse of softplus, without the cancellation of log(exp(dt) - 1).
    return dt + torch.log(-torch.expm1(-dt))
