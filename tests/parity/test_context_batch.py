"""Our forward step under context parallelism: each rank computes its part, STP hears of the whole sequence."""

from types import SimpleNamespace

import torch

from megacpp_stp.stp.layout import SequenceLayout, reference_positions
from tests.parity._gloo import Layout, run_ranks

SEQUENCE, END = 16, 3


def heard_and_computed():
    """What the model and STP get of one batch, on this rank."""
    from megatron.core import parallel_state

    from megacpp_stp.training.progress import Progress
    from megacpp_stp.training.step import ForwardStep

    heard, computed = [], []
    recorder = SimpleNamespace(
        begin_forward=lambda training: None, announce=lambda **facts: heard.append(facts), add_loss=lambda *a, **k: None
    )
    finite = SimpleNamespace(watch=lambda chunk: None)
    step = ForwardStep(
        device=torch.device("cpu"),
        recorder=recorder,
        end_of_document=END,
        finite=finite,
        progress=Progress(lambda: 0),
    )

    def model(tokens, positions, mask, *, labels, loss_mask):
        computed.extend((tokens, positions, labels, loss_mask))
        return torch.zeros(tokens.shape)

    model.training = True
    tokens = torch.arange(2 * SEQUENCE).reshape(2, SEQUENCE) % 7
    batch = {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": (tokens != END).float(),
        "position_ids": torch.arange(SEQUENCE).expand(2, SEQUENCE),
    }
    step(iter([batch]), model)
    (facts,) = heard
    rank = parallel_state.get_context_parallel_rank()
    return rank, computed, float(facts["tokens"]), facts["documents"](), batch


def test_each_context_rank_computes_its_own_chunks_and_counts_its_own_tokens():
    ranks = run_ranks(heard_and_computed, 2, layout=Layout(context=2))
    for rank, (tokens, positions, labels, mask), counted, documents, batch in ranks:
        mine = reference_positions(SequenceLayout(context_size=2, context_rank=rank), SEQUENCE)
        assert torch.equal(tokens, batch["tokens"][:, mine])
        assert torch.equal(labels, batch["labels"][:, mine])
        assert torch.equal(positions, batch["position_ids"][:, mine])
        assert counted == float(mask.sum()) == float(batch["loss_mask"][:, mine].sum())
        ends = (batch["tokens"] == END).long()
        assert torch.equal(documents, ends.cumsum(1) - ends)
    assert sum(counted for _, _, counted, _, _ in ranks) == float(ranks[0][4]["loss_mask"].sum())


def test_without_context_parallelism_the_batch_is_whole():
    ((_, (tokens, *_), counted, _, batch),) = run_ranks(heard_and_computed, 1)
    assert torch.equal(tokens, batch["tokens"])
    assert counted == float(batch["loss_mask"].sum())
