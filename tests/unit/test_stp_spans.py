"""Every policy of a tap against plain autograd of the plain loss at the spans that it draws.

Letters: s sequence, b batch, h hidden, K spans.
"""

from dataclasses import replace

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.stp.config import FINAL_NORM, StpConfig
from megacpp_stp.stp.microbatch import Facts
from megacpp_stp.stp.reference import reference_chord_loss, reference_patches, reference_stp_loss, reference_triples
from megacpp_stp.stp.sampler import DrawKey
from megacpp_stp.stp.spans import draw_spans
from megacpp_stp.stp.taps import Place, StpTaps

SEQUENCE, BATCH, HIDDEN = 17, 3, 5
CONFIG = StpConfig(weight=0.6, n_spans=4, start_step=10, taps=(2, 9, FINAL_NORM), seed=7)
# One long document; two and padding; nothing to draw from.
DOCUMENTS = torch.tensor(
    [[0] * SEQUENCE, [0] * 5 + [1] * 9 + [-1] * 3, [n for i in range(9) for n in (i, i)][:SEQUENCE]]
)
POLICIES = {
    "triple": {},
    "window": {"max_span": 4},
    "documents": {"within_documents": True},
    "documents and window": {"within_documents": True, "max_span": 3},
    "chord": {"objective": "chord"},
    "chord in documents": {"objective": "chord", "within_documents": True},
}


def spans_of(config, *, tap, iteration, microbatch, data_rank=0):
    """Positions ``[m, K, b]`` and ``[K, b]`` bool, by the key that a tap must use."""
    key = DrawKey(seed=7, iteration=iteration, microbatch=microbatch, data_rank=data_rank, layer=tap)
    spans, allowed = draw_spans(
        config,
        key,
        length=SEQUENCE,
        batch=BATCH,
        device=torch.device("cpu"),
        documents=DOCUMENTS if config.within_documents else None,
    )
    return spans, torch.ones(spans.shape[1:], dtype=torch.bool) if allowed is None else allowed


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("tap", [2, FINAL_NORM])
def test_a_tap_gives_the_gradient_of_plain_autograd_under_every_policy(policy, tap):
    config = replace(CONFIG, ramp_steps=4, **policy)
    states = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64)
    mine, plain = states.clone().requires_grad_(), states.clone().requires_grad_()
    taps = StpTaps(config, iteration=lambda: 11, data_rank=0)
    taps.scale.set(torch.tensor([8.0]))
    facts = Facts(documents=DOCUMENTS if config.within_documents else None)
    taps.read(mine, tap=tap, place=Place(11, 3, facts)).square().sum().backward()

    spans, allowed = spans_of(config, tap=tap, iteration=11, microbatch=3)
    places = [(b, *spans[:, k, b].tolist()) for k, b in allowed.nonzero().tolist()]
    assert places
    loss_of = reference_chord_loss if config.objective == "chord" else reference_stp_loss
    loss = loss_of(plain, places, tolerance=torch.finfo(torch.float64).eps)
    # Second iteration of a ramp of four: half of the weight, over three taps.
    (plain.square().sum() + 8.0 * 0.6 * 0.5 / 3 * loss).backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-10, atol=1e-12)
    reading = taps.meter.reduce(device=torch.device("cpu"), groups=[])
    assert reading.loss_by_tap[tap] == pytest.approx(loss.item(), abs=1e-12)
    assert reading.valid_by_tap[tap] == pytest.approx(allowed.double().mean().item())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_span_is_one_that_the_policy_allows(policy):
    config = replace(CONFIG, n_spans=64, **policy)
    spans, allowed = spans_of(config, tap=9, iteration=0, microbatch=0)
    for b in range(BATCH):
        documents = DOCUMENTS[b].tolist() if config.within_documents else [0] * SEQUENCE
        chord = config.objective == "chord"
        every = reference_patches(documents) if chord else reference_triples(documents, max_span=config.max_span)
        assert allowed[:, b].tolist() == [bool(every)] * 64
        drawn = {tuple(spans[:, k, b].tolist()) for k in range(64)}
        assert not every or drawn <= set(every)
        assert len(drawn) > 1 or not every


@pytest.mark.parametrize("other", [{"iteration": 1}, {"microbatch": 1}, {"data_rank": 1}, {"tap": FINAL_NORM}])
def test_draws_differ_by_place(other):
    place = {"tap": 9, "iteration": 0, "microbatch": 0, "data_rank": 0}
    mine, _ = spans_of(CONFIG, **place)
    assert torch.equal(mine, spans_of(CONFIG, **place)[0])
    assert not torch.equal(mine, spans_of(CONFIG, **place | other)[0])


def test_documents_of_another_shape_are_refused():
    taps = StpTaps(replace(CONFIG, within_documents=True), iteration=lambda: 10, data_rank=0)
    place = Place(10, 0, Facts(documents=DOCUMENTS[:, :-1]))
    with pytest.raises(UserError) as caught:
        taps.read(torch.randn(SEQUENCE, BATCH, HIDDEN), tap=2, place=place)
    assert caught.value.field == "documents"
