"""Which of Megatron's options rule a fused loss out: known from the arguments alone, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limit:
    """One option that stands in the way.

    Attributes:
        option: As Megatron spells it.
        why: In a clause.
        fix: What to do about it.
    """

    option: str
    why: str
    fix: str = "leave it out"


_REFUSED = (
    Limit("--cross-entropy-loss-fusion", "is another fusion of the loss, which needs the logits"),
    Limit("--defer-embedding-wgrad-compute", "keeps the gradient of the logits for later"),
    Limit("--tensor-parallel-num-weight-shards", "shards the output weight beyond the vocabulary"),
    Limit("--use-megatron-fsdp", "takes the output weight away before the loss reads it"),
    Limit("--use-torch-fsdp2", "takes the output weight away before the loss reads it"),
    Limit("--fp16-lm-cross-entropy", "asks for a loss in fp16; the fused one is in fp32"),
    Limit("--logits-save-dir", "saves the logits"),
    Limit("--logits-load-dir", "compares the logits with a teacher's"),
)
_FUSION = Limit(
    "--no-gradient-accumulation-fusion",
    "is missing: Megatron would add the weight's gradient in the output layer, which the fused loss does not",
    fix="add it",
)
_NO_GRAPHS = Limit("--cuda-graph-impl", "captures what cut-cross-entropy reads back to the host")
_NO_ORDER = Limit("--deterministic-mode", "promises equal bits, and cut-cross-entropy adds in no fixed order")
_NO_SCALE = Limit("--use-mup", "scales the logits, which cut-cross-entropy does not")


def limits(argv: Sequence[str], *, backend: str = "torch") -> tuple[Limit, ...]:
    """What of a plan's arguments a fused loss does not go with; empty when it does.

    Args:
        argv: Megatron's arguments, one option or value each.
        backend: See `megacpp_stp.flce.backends.find_backend`.
    """
    given = {argument.partition("=")[0] for argument in argv if argument.startswith("--")}
    refused = _REFUSED if backend == "torch" else (*_REFUSED, _NO_GRAPHS, _NO_ORDER, _NO_SCALE)
    found = tuple(limit for limit in refused if limit.option in given)
    return found if _FUSION.option in given else (*found, _FUSION)
