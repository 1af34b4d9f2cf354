"""Megatron datasets of a prepared directory, and the batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One microbatch, ``[b, s]`` each.

    Attributes:
        tokens: int64.
        labels: int64, tokens shifted by one.
        loss_mask: fp32, 0 where a token does not count.
        position_ids: int64.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor


def next_batch(iterator: Iterator[dict[str, Tensor]], device: torch.device) -> Batch:
    """The next microbatch on `device`.

    Every pipeline stage reads it, not only the first and last: what STP needs to know of a sequence must be
    known where its taps are.
    """
    data = next(iterator)
    return Batch(*(data[name].to(device, non_blocking=True) for name in Batch._fields))


def own_part(batch: Batch) -> Batch:
    """What this context-parallel rank computes of a batch, by Megatron's own split; all of it without one."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    part = get_batch_on_this_cp_rank(
        {**batch._asdict(), "cu_seqlens": None},
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    return Batch(*(part[name] for name in Batch._fields))


def dataset_provider() -> Callable[..., tuple[Any, Any, Any]]:
    """Megatron's ``train_valid_test_dataset_provider`` for the ``--*-data-path`` arguments."""

    def provide(sample_counts: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset
        from megatron.training import get_args

        config = _dataset_config(get_args())
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sample_counts, lambda: True, config)
        train, valid, test = builder.build()
        return train, valid, test

    # Every rank builds: the builder itself lets one rank write the index cache and the others wait.
    provide.is_distributed = True  # type: ignore[attr-defined]
    return provide


def _dataset_config(args: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list
    from megatron.training import get_tokenizer

    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        blend_per_split=[
            get_blend_from_list(paths) for paths in (args.train_data_path, args.valid_data_path, args.test_data_path)
        ],
        path_to_cache=args.data_cache_path,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mmap_bin_files=args.mmap_bin_files,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
    )
