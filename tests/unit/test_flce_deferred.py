"""Logits that were not computed: what they answer, and that all else is refused; backends and limits."""

import pytest
import torch

from megacpp_stp.errors import UserError
from megacpp_stp.flce.backends import BACKENDS, _CutCrossEntropy, find_backend
from megacpp_stp.flce.chunked import Options, linear_cross_entropy
from megacpp_stp.flce.deferred import DeferredLogits, Head
from megacpp_stp.flce.limits import limits
from megacpp_stp.flce.reference import linear_cross_entropy_reference

SEQUENCE, BATCH, HIDDEN, VOCAB = 7, 2, 5, 11


def deferred(**options):
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=make, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=make, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (SEQUENCE, BATCH), generator=make)
    calls = []

    def loss(*args):
        calls.append(args)
        return linear_cross_entropy(*args)

    head = Head(loss=loss, options=Options(columns=3, **options), logits=torch.nn.functional.linear)
    return DeferredLogits(hidden, weight, head), hidden, weight, labels, calls


@pytest.mark.parametrize("with_best", [False, True])
def test_they_answer_what_megatron_asks(with_best):
    deferred_logits, hidden, weight, labels, _ = deferred(with_best=with_best)
    logits = hidden @ weight.t()
    assert deferred_logits.shape == logits.shape and deferred_logits.size(-1) == VOCAB
    assert deferred_logits.size() == logits.size()
    wanted = linear_cross_entropy_reference(hidden.reshape(-1, HIDDEN), weight, labels.reshape(-1))
    torch.testing.assert_close(deferred_logits.loss(labels), wanted.view(SEQUENCE, BATCH))
    values, indices = deferred_logits.max(dim=-1)
    torch.testing.assert_close(values, logits.amax(-1).detach())
    assert torch.equal(indices, logits.argmax(-1))
    assert torch.equal(torch.argmax(deferred_logits, dim=-1), logits.argmax(-1))
    torch.testing.assert_close(deferred_logits.transpose(0, 1), logits.transpose(0, 1))


def test_they_can_be_scaled_by_a_number():
    deferred_logits, hidden, weight, labels, calls = deferred()
    scaled = deferred_logits * 3 * 0.5
    wanted = linear_cross_entropy_reference(hidden.reshape(-1, HIDDEN), weight, labels.reshape(-1), scale=1.5)
    torch.testing.assert_close(scaled.loss(labels), wanted.view(SEQUENCE, BATCH))
    torch.testing.assert_close(scaled.max(dim=-1).values, 1.5 * (hidden @ weight.t()).amax(-1).detach())
    torch.testing.assert_close(scaled.transpose(0, 1), 1.5 * (hidden @ weight.t()).transpose(0, 1))
    assert [options.scale for *_, options in calls] == [1.5]


def test_all_else_is_refused():
    logits, *_ = deferred()
    for use in (
        lambda: logits * torch.ones(1),
        lambda: torch.softmax(logits, dim=-1),
        lambda: torch.argmax(logits),
        lambda: torch.ones(1) * logits,
        lambda: logits + 1,
        lambda: logits[0],
        lambda: logits.max(dim=0),
    ):
        with pytest.raises(TypeError):
            use()
    with pytest.raises(AttributeError, match="no float: the loss is fused"):
        logits.float()


def test_backends_are_found_by_name(monkeypatch):
    assert BACKENDS[0] == "torch" and find_backend("torch") is linear_cross_entropy
    with pytest.raises(UserError, match="is no backend") as error:
        find_backend("liger-kernel")
    assert error.value.fix is not None and "cut-cross-entropy" in error.value.fix

    def no_library(name, *args, **kwargs):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", no_library)
    with pytest.raises(UserError, match="needs cut-cross-entropy with its exact variant"):
        find_backend("cut-cross-entropy")


def test_cut_cross_entropy_refuses_what_it_is_not_exact_for():
    kernels = _CutCrossEntropy(library=None)
    weight, labels = torch.zeros(VOCAB, HIDDEN), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(UserError, match="runs on a GPU only"):
        kernels(torch.zeros(3, HIDDEN), weight, labels, Options())


ARGV = ("--hidden-size", "8", "--no-gradient-accumulation-fusion", "--bf16")


def test_limits_of_a_plans_arguments():
    assert limits(ARGV) == ()
    assert [limit.option for limit in limits(ARGV[:2])] == ["--no-gradient-accumulation-fusion"]
    for option in ("--cross-entropy-loss-fusion", "--use-torch-fsdp2", "--tensor-parallel-num-weight-shards=2"):
        (limit,) = limits((*ARGV, option))
        assert limit.option == option.partition("=")[0] and limit.why and limit.fix == "leave it out"
    for option in ("--use-mup", "--deterministic-mode"):
        assert limits((*ARGV, option)) == ()
        assert [limit.option for limit in limits((*ARGV, option), backend="cut-cross-entropy")] == [option]
