"""A digest of the weights at the end of a run: equal for equal bits in an equal layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_BYTES = 2**26


def weights_digest(chunks: Sequence[nn.Module]) -> str:
    """sha256 over the weights of all ranks. A collective: every rank calls it, and gets the same.

    Each rank hashes its part (`part_digest`); the digest of the whole is over the parts in rank order, each with its
    place in the layout. So it says whether two runs of one layout end in the same bits, and nothing of two layouts:
    those cut one model into other parts.

    Args:
        chunks: This rank's bare model chunks.
    """
    from megacpp_stp.patches.agreement import gather

    return digest_of_parts(gather((_place(), part_digest(chunks))))


def digest_of_parts(parts: Sequence[tuple[str, str]]) -> str:
    """Of all parts in rank order, each with its place."""
    return hashlib.sha256("".join(f"{place} {part}\n" for place, part in parts).encode()).hexdigest()


def part_digest(chunks: Sequence[nn.Module]) -> str:
    """sha256 over this rank's weights: of each its chunk, name, dtype, shape and bytes, in the order of the names.

    Weights are what a checkpoint holds of the model: parameters and persistent buffers, such as the experts' bias.
    """
    digest = hashlib.sha256()
    for name, tensor in _weights(chunks):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in tensor.reshape(-1).view(torch.uint8).split(_CHUNK_BYTES):
            digest.update(memoryview(piece.cpu().numpy()))
    return digest.hexdigest()


def _weights(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for number, chunk in enumerate(chunks):
        # Transformer Engine keeps scales and versions in its "extra states": not weights, and not comparable.
        state = {name: value for name, value in chunk.state_dict().items() if not name.endswith("_extra_state")}
        for name in sorted(state):
            if torch.is_tensor(state[name]):
                yield f"{number}.{name}", _plain(state[name])


def _plain(weight: Any) -> Tensor:
    """The values of a weight that is kept in fp8, by Transformer Engine's own conversion; else the weight."""
    plain: Tensor = weight.detach() if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()
    return plain.contiguous()


def _place() -> str:
    """This rank's coordinates in the layout."""
    from megatron.core import parallel_state as state

    parts = (
        ("tp", state.get_tensor_model_parallel_rank()),
        ("cp", state.get_context_parallel_rank()),
        ("ep", state.get_expert_model_parallel_rank()),
        ("pp", state.get_pipeline_model_parallel_rank()),
        ("dp", state.get_data_parallel_rank()),
    )
    return " ".join(f"{name}{rank}" for name, rank in parts)
