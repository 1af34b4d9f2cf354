"""What somebody else put in the place of upstream's code before us is not what was reviewed."""

from __future__ import annotations

import functools

import megatron.core.datasets.helpers as helpers
import megatron.core.datasets.utils as utils
import megatron.core.optimizer as optimizer
import megatron.training.initialize as initialize
import pytest
from megatron.core.transformer.experimental_attention_variant import dsa, dsa_kernels

from megacpp_stp.patches.loaded import foreign
from megacpp_stp.patches.records import PatchRefused
from megacpp_stp.patches.registry import Registry
from tests.unit.patch_surfaces import CORE

PLAN = {"patches": ["dataset-helpers"]}
LEDGER = Registry.load().ledger
TABLE = "_BACKEND_MODULE_NAME_BY_BACKEND"


@pytest.mark.parametrize("id", LEDGER)
def test_what_megatron_loads_is_its_own(id):
    assert list(foreign(LEDGER[id], CORE)) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [(utils, "compile_helpers"), (initialize, "_compile_dependencies"), (helpers, "build_sample_idx")],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_target_a_consumer_or_what_it_relies_on_that_somebody_replaced_is_refused(monkeypatch, module, name, wrapped):
    def other(*args):
        return None

    value = functools.wraps(getattr(module, name))(other) if wrapped else other
    monkeypatch.setattr(module, name, value)
    with pytest.raises(PatchRefused, match=f"put there before: .*{name}") as caught:
        Registry.load().activate(PLAN, core=CORE)
    assert caught.value.records[0].reason is not None
    assert getattr(module, name) is value


def test_a_function_of_the_same_name_from_another_file_is_another(monkeypatch):
    def compile_helpers():
        return None

    compile_helpers.__code__ = compile_helpers.__code__.replace(co_qualname="compile_helpers")
    monkeypatch.setattr(utils, "compile_helpers", compile_helpers)
    with pytest.raises(PatchRefused, match="test_patch_loaded.py"):
        Registry.load().activate(PLAN, core=CORE)


def test_another_function_of_the_same_file_is_another(monkeypatch):
    monkeypatch.setattr(optimizer, "_get_param_groups", optimizer.get_megatron_optimizer)
    (found,) = foreign(LEDGER["fp32-groups"], CORE)
    assert found.startswith("megatron.core.optimizer:_get_param_groups (get_megatron_optimizer of ")


def test_a_method_of_a_class_that_is_relied_on_is_looked_at(monkeypatch):
    monkeypatch.setattr(dsa.FusedDSAIndexerLoss, "forward", staticmethod(lambda ctx: None))
    (found,) = foreign(LEDGER["dsa-memory"], CORE)
    assert "dsa:FusedDSAIndexerLoss.forward (" in found


def test_a_row_that_the_table_has_not_in_its_file_is_somebody_elses(monkeypatch):
    monkeypatch.setitem(getattr(dsa_kernels, TABLE), "chunked", "somewhere")
    (found,) = foreign(LEDGER["dsa-memory"], CORE)
    assert found.endswith(":_BACKEND_MODULE_NAME_BY_BACKEND[chunked] ('somewhere')")
