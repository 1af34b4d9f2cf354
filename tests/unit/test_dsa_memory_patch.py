"""The surface that puts the chunks into upstream's table: needed when chosen, proven through the table, undone."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.experimental_attention_variant import dsa_kernels

from megacpp_stp.dsa import backend
from megacpp_stp.errors import UserError
from megacpp_stp.patches import dsa_memory
from megacpp_stp.patches.judge import State
from megacpp_stp.patches.registry import Registry

TABLE = "_BACKEND_MODULE_NAME_BY_BACKEND"


def plan(kernel="chunked", kind="dsa"):
    sparse = {} if kernel is None else {"kernel": kernel}
    return {
        "patches": ["dsa-memory"],
        "layout": {"layers": [{"kind": "mla"}, {"kind": kind}]},
        "recipe": {"model": {"families": {"A": {"sparse": sparse}}}},
    }


def config(**changes):
    settings = {"dsa_kernel_backend": "none", "attention_backend": None, "dsa_indexer_topk_freq": 1}
    return SimpleNamespace(**{**settings, **changes})


def test_it_becomes_active_counts_and_is_undone():
    before, modules = dict(getattr(dsa_kernels, TABLE)), set(sys.modules)
    with Registry.load().activate(plan()) as active:
        (record,) = active.records
        assert record.state == State.ACTIVE
        assert "worst relative error" in record.probe
        assert active.calls() == {"dsa-memory": {}}
        chosen = config()
        active.configure(chosen)
        assert chosen.dsa_kernel_backend == backend.NAME
        assert dsa_kernels.use_fused_dsa_kernels(chosen)
        hook = dsa_kernels._resolve_fused_hook(chosen, "run_fused_qk_topk")
        with pytest.raises(UserError):
            hook()
        assert list(active.calls()["dsa-memory"].values()) == [1]
    assert getattr(dsa_kernels, TABLE) == before
    assert not [name for name in set(sys.modules) - modules if name.startswith("megacpp_stp.dsa.backend.")]


def test_a_second_activation_counts_for_itself():
    """Upstream keeps the module that it imported last."""
    for _ in range(2):
        with Registry.load().activate(plan()) as active:
            with pytest.raises(UserError):
                dsa_kernels._resolve_fused_hook(config(dsa_kernel_backend="chunked"), "run_fused_qk_topk")()
            assert list(active.calls()["dsa-memory"].values()) == [1]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (plan(kernel="upstream"), "'upstream', which is Megatron's own"),
        (plan(kernel=None), "'upstream', which is Megatron's own"),
        (plan(kernel="tilelang"), "'tilelang', which is Megatron's own"),
        (plan(kernel="cudnn"), "'cudnn', which is Megatron's own"),
        (plan(kind="mla"), "no layer of it has sparse attention"),
    ],
)
def test_it_is_not_needed_where_the_plan_has_other_kernels_or_none(case, reason):
    assert reason in dsa_memory.SURFACE.unneeded(case)
    assert dsa_memory.SURFACE.unneeded(plan()) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dsa_kernel_backend": "tilelang"}, "--dsa-kernel-backend"),
        ({"attention_backend": "unfused"}, "--attention-backend"),
        ({"attention_backend": SimpleNamespace(name="unfused")}, "--attention-backend"),
        ({"dsa_indexer_topk_freq": 2}, "--dsa-indexer-topk-freq"),
    ],
)
def test_a_configuration_that_contradicts_is_refused(changes, field):
    with pytest.raises(UserError) as caught:
        dsa_memory.SURFACE.configure(config(**changes))
    assert caught.value.field == field
    assert caught.value.fix


@pytest.mark.parametrize("broken", ["sparse_attention", "sparse_indexer_loss", "dense_indexer_loss", "select_keys"])
def test_the_probe_sees_a_wrong_result(monkeypatch, broken):
    right = getattr(backend, broken)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        if broken == "select_keys":
            return found.roll(1, dims=1).clamp_max(torch.arange(found.shape[1])[:, None])
        return (found[0] * 1.001, found[1]) if isinstance(found, tuple) else found * 1.001

    monkeypatch.setattr(backend, broken, wrong)
    with pytest.raises(UserError, match="differs from upstream's"):
        Registry.load().activate(plan())
    assert "chunked" not in getattr(dsa_kernels, TABLE)


def test_the_name_is_the_same_in_both_places():
    assert dsa_memory._NAME == backend.NAME
    assert dataclasses.is_dataclass(dsa_memory.SURFACE)
