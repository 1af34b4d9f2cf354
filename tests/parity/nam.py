"""A NAM with every letter of its recipes, trained from a recipe's own arguments in any layout, from the same weights.

The way is the product's: recipe to arguments to Megatron's parser, builder, wrappers, schedule and optimizer.

Letters: b batch, s sequence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megacpp_stp.plan.argv import emit
from megacpp_stp.plan.lowering import lower
from megacpp_stp.plan.stages import choose_stages
from megacpp_stp.recipe import load_recipe
from megacpp_stp.recipe.schema import Recipe
from tests.parity.checkpoints import load_weights, spoil
from tests.parity.cuts import Cut, cut_of, part_of
from tests.parity.te_names import torch_name

SEQUENCE, BATCH, VOCAB, STEPS = 48, 2, 256, 5
BASE = (
    "stp=null",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.heads=4",
    f"model.vocab_size={VOCAB}",
    "model.families.E={block: moe, experts: 4, topk: 2, ffn_hidden_size: 32, shared_ffn_hidden_size: 32, "
    "grouped_gemm: false, dispatcher: alltoall, router: {score_function: sigmoid, expert_bias: true, "
    "aux_loss_coeff: 1.0e-2, z_loss_coeff: 1.0e-3}}",
    "model.families.M={block: mamba3, heads: 4, head_dim: 16, state_dim: 16, groups: 2, chunk_size: 16, "
    "complex_rotation: true, mimo_rank: 1, kernel: torch}",
    "model.families.R={block: m2rnn, heads: 4, key_dim: 8, value_dim: 8, conv_kernel: 4, checkpoint_every: 16, "
    "kernel: torch}",
    f"training.sequence_length={SEQUENCE}",
    f"training.micro_batch_size={BATCH}",
    "training.global_batch_size=8",
    "optimizer.lr=1.0e-2",
    # Adam divides a gradient by its own size: with the usual 1e-8 it would blow up the rounding of the smallest ones.
    "optimizer.epsilon=1.0e-3",
)
ALL_LETTERS = (
    *BASE,
    "model.families.A={block: mla, q_lora_rank: 24, kv_lora_rank: 24, qk_head_dim: 16, qk_pos_emb_head_dim: 8, "
    "v_head_dim: 12, dense_mlp: false, sparse: {ranks: [1, 2], indexer_heads: 2, indexer_head_dim: 16, topk: 12, "
    "kernel: upstream, loss: dense, "
    "loss_coeff: 0.1}}",
    "model.mtp={depths: 2, pattern: AE, loss_coeff: 0.3}",
)
# Megatron's experts and MLA refuse tensor parallelism without sequence parallelism.
NO_EXPERTS = (
    *BASE,
    "model.pattern=AMAR",
    "model.families.E=null",
    "model.families.A={block: attention, head_dim: 16, kv_groups: 2, dense_mlp: true}",
)


class Step(NamedTuple):
    """What is logged of one step, equal on all ranks that know it.

    Attributes:
        loss: Cross entropy a token; None before the last pipeline stage.
        grad_norm: Of all parameters.
        others: Losses of multi-token prediction and of the indexer, by the name that Megatron logs.
    """

    loss: float | None
    grad_norm: float
    others: dict[str, float]


class Outcome(NamedTuple):
    """What one rank found.

    Attributes:
        steps: One entry a step.
        parameters: After all steps, under names that hold in every layout; this rank's part.
        cuts: How to cut the whole of a parameter to this part; see `part_of`.
    """

    steps: list[Step]
    parameters: dict[str, Tensor]
    cuts: dict[str, Cut | None]


def train(overrides: tuple[str, ...], steps: int = STEPS) -> Outcome:
    """Train on this rank."""
    return outcome_of(Training(overrides), steps)


def outcome_of(model: Training, steps: int = STEPS) -> Outcome:
    """Train a model that is there."""
    found = [model.step(number) for number in range(steps)]
    named = dict(named_parameters(model.chunks))
    cuts = {name: cut_of(name, parameter) for name, parameter in named.items()}
    return Outcome(found, {name: parameter.detach().clone() for name, parameter in named.items()}, cuts)


class Training:
    """A model with its optimizer on this rank, from a recipe.

    Args:
        overrides: Of nam56r-tiny.
        load: Folder of a checkpoint with its weights; None for weights by name.

    Attributes:
        wrapped: Its chunks as the schedule runs them.
        chunks: The HybridModels in them.
        filled: Their weights before they were wrapped, by name.
    """

    def __init__(self, overrides: tuple[str, ...], load: str | None = None) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import get_megatron_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.argument_utils import hybrid_config_from_args
        from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

        args = arguments_of(load_recipe("nam56r-tiny", overrides))
        config = hybrid_config_from_args(args)
        config.transformer.finalize_model_grads_func = finalize_model_grads
        config.pre_wrap_hooks.append(self._fill if load is None else spoil)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        wrapper = {} if args.bf16 else {"mixed_precision_wrapper": None}
        builder = config.get_builder_cls()(config)
        self.wrapped = builder.build_distributed_models(groups, ddp_config=get_megatron_ddp_config(args), **wrapper)
        optimizer_config, by_group = get_megatron_optimizer_config(args)
        self.optimizer = get_megatron_optimizer(optimizer_config, self.wrapped, config_overrides=by_group)
        config.transformer.grad_scale_func = self.optimizer.scale_loss
        self.args, self.groups = args, groups
        self.chunks = [_bare(chunk) for chunk in self.wrapped]
        if load is not None:
            load_weights(self, load)

    def _fill(self, chunks: list[Any]) -> list[Any]:
        """Before any wrapper: weights by name."""
        fill_by_name(chunks)
        self.filled = {name: parameter.detach().clone() for name, parameter in named_parameters(chunks)}
        return chunks

    def step(self, number: int) -> Step:
        """One optimizer step."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        args = self.args
        count = args.global_batch_size // (args.micro_batch_size * self.groups.dp.size())
        batches = list(microbatches(count * self.groups.dp.size(), seed=7 + number))[
            self.groups.dp.rank() :: self.groups.dp.size()
        ]
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in self.wrapped],
            model=self.wrapped,
            num_microbatches=count,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
        )
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        return Step(self._mean(reports), float(norm), _other_losses(count))

    def _mean(self, reports: list[dict[str, Tensor]]) -> float | None:
        if not reports:
            return None
        sums = torch.stack([report["lm loss"] for report in reports]).sum(dim=0)
        torch.distributed.all_reduce(sums, group=self.groups.dp)
        return float(sums[0] / sums[1])


def arguments_of(recipe: Recipe) -> Any:
    """Megatron's parsed and validated arguments, which are then its global ones."""
    from megatron.training.global_vars import set_args

    from tests.parity.test_parameter_count import parsed_arguments

    layout = lower(recipe, stages=choose_stages(recipe))
    argv = [token for argument in emit(recipe, layout, device="cpu") for token in argument.tokens]
    args = parsed_arguments(argv, recipe.model.vocab_size)
    set_args(args)
    return args


def _bare(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _forward_step(iterator: Iterator[dict[str, Tensor]], model: Any) -> Any:
    batch = next(iterator)
    mask = batch["loss_mask"]
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=mask)

    def loss(per_token: Tensor) -> Any:
        total = (per_token.float() * mask).sum()
        return total, mask.sum().to(torch.int), {"lm loss": torch.stack((total.detach(), mask.sum()))}

    return output, loss


def _other_losses(count: int) -> dict[str, float]:
    """As megatron.training's log makes them, on every rank."""
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    found: dict[str, Tensor] = {}
    MTPLossLoggingHelper.track_mtp_metrics(1 / count, 0, None, total_loss_dict=found)
    DSAIndexerLossLoggingHelper.track_indexer_metrics(1 / count, 0, None, total_loss_dict=found)
    return {name: float(value) for name, value in found.items()}


def microbatches(count: int, *, seed: int) -> Iterator[dict[str, Tensor]]:
    """`count` microbatches of ``[b, s]`` tensors; some tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": (torch.rand((BATCH, SEQUENCE), generator=generator) < 0.8).float(),
            "position_ids": torch.arange(SEQUENCE).repeat(BATCH, 1),
        }


# --- weights by name --------------------------------------------------------------------------------


def named_parameters(chunks: list[Any]) -> Iterator[tuple[str, Any]]:
    """Parameters under names that are the same in every layout and backend: by global layer and expert number."""
    for chunk in chunks:
        first = {number: layer.layer_number for number, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            parts = torch_name(name).split(".")
            if name.startswith("decoder.layers."):
                parts[2] = str(first[int(parts[2])])
            if "local_experts" in parts:
                place = parts.index("local_experts") + 1
                parts[place] = str(_first_expert(chunk.config) + int(parts[place]))
            yield ".".join(parts), parameter


def _first_expert(config: Any) -> int:
    from megatron.core import parallel_state as state

    experts = config.num_moe_experts // state.get_expert_model_parallel_world_size()
    return state.get_expert_model_parallel_rank() * experts


def fill_by_name(chunks: list[Any]) -> None:
    """Overwrite every weight with noise seeded by its name, or with this rank's part of it."""
    with torch.no_grad():
        for name, parameter in named_parameters(chunks):
            cut, shape = cut_of(name, parameter), list(parameter.shape)
            if cut:
                shape[cut.dim] *= cut.size
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(part_of(_first_value(name, noise), cut))


def _first_value(name: str, noise: Tensor) -> Tensor:
    if name.endswith("dt_bias"):
        return noise - 3  # steps that leave a memory of tens of tokens
    if noise.dim() == 1 and not re.search(r"bias$", name):
        return 1 + 0.1 * noise
    return 0.1 * noise
