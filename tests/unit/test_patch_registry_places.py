"""What a patch surface can replace beside a function: an entry of a table, a method, a static method; on the real
megatron-core, with surfaces of the tests' own."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from megatron.core.models.common.language_module import language_module
from megatron.core.transformer.experimental_attention_variant import dsa_kernels

from megacpp_stp.patches.contract import Replacement
from megacpp_stp.patches.records import PatchRefused
from tests.unit.patch_surfaces import LOSS, entry, plan, registry, replaces, surface

TABLE = "megatron.core.transformer.experimental_attention_variant.dsa_kernels:_BACKEND_MODULE_NAME_BY_BACKEND"
ROUTE = {
    "function": "megatron.core.transformer.experimental_attention_variant.dsa_kernels:_get_backend_module_name",
    "through": "_BACKEND_MODULE_NAME_BY_BACKEND",
    "called_on": "some",
}
OTHER_ROUTE = {**ROUTE, "function": ROUTE["function"].replace("_get_backend_module_name", "_get_dsa_kernel_backend")}


@pytest.fixture(autouse=True)
def table_as_it_was():
    """Whatever a test does, upstream's table is as it was."""
    before = dict(dsa_kernels._BACKEND_MODULE_NAME_BY_BACKEND)
    yield
    assert before == dsa_kernels._BACKEND_MODULE_NAME_BY_BACKEND


def kernels(id="kernels"):
    return entry(id, replaces(f"{TABLE}[ours]", ROUTE, OTHER_ROUTE))


def test_an_entry_of_a_table_can_be_a_module_that_counts_for_one_activation():
    def replace(originals, hits):
        assert originals == {}
        backend = ModuleType("megacpp_stp_kernels")
        backend.run = lambda: hits.add(ROUTE["function"])
        return {f"{TABLE}[ours]": Replacement(value=backend)}

    def probe(probe):
        names = dict.fromkeys((ROUTE["function"], OTHER_ROUTE["function"]), "megacpp_stp_kernels")
        assert probe.through == {f"{TABLE}[ours]": names}
        load_ours().run()
        return "runs"

    def load_ours():
        config = type("Config", (), {"dsa_kernel_backend": "ours"})
        return dsa_kernels._load_backend(config)

    surfaces = registry((kernels(), surface("kernels", replace=replace, probe=probe)))
    with surfaces.activate(plan("kernels")) as active:
        load_ours().run()
        assert active.calls() == {"kernels": {ROUTE["function"]: 1}}
    assert "megacpp_stp_kernels" not in sys.modules
    with pytest.raises(ValueError, match="dsa_kernel_backend must be one of"):
        load_ours()


def test_what_is_no_function_must_count_itself():
    replaced = {f"{TABLE}[ours]": Replacement(value="megatron.none")}
    surfaces = registry((kernels(), surface("kernels", replace=lambda originals, hits: replaced)))
    with pytest.raises(PatchRefused, match="must count its own calls"):
        surfaces.activate(plan("kernels"))


def test_a_method_is_replaced_in_the_class_that_defines_it():
    hybrid = "megatron.core.models.hybrid.hybrid_model:HybridModel.forward"
    consumer = {"function": hybrid, "through": "HybridModel.compute_language_model_loss", "called_on": "some"}
    original = language_module.LanguageModule.compute_language_model_loss
    with registry((entry("method", replaces(LOSS, consumer)), surface("method"))).activate(plan("method")):
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        assert HybridModel.compute_language_model_loss() == ("method", original)
        assert "compute_language_model_loss" not in vars(HybridModel)
    assert vars(language_module.LanguageModule)["compute_language_model_loss"] is original


def test_a_static_method_stays_one():
    scaler = "megatron.core.transformer.moe.moe_utils:MoEAuxLossAutoScaler"
    consumer = {
        "function": "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
        "through": "MoEAuxLossAutoScaler.set_loss_scale",
        "called_on": "maybe",
    }
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    before = vars(MoEAuxLossAutoScaler)["set_loss_scale"]
    assert isinstance(before, staticmethod)
    made = entry("scale", replaces(f"{scaler}.set_loss_scale", consumer))
    with registry((made, surface("scale"))).activate(plan("scale")):
        assert isinstance(vars(MoEAuxLossAutoScaler)["set_loss_scale"], staticmethod)
        assert MoEAuxLossAutoScaler().set_loss_scale() == ("scale", before.__func__)
    assert vars(MoEAuxLossAutoScaler)["set_loss_scale"] is before


def test_a_consumer_that_does_not_name_the_method_is_refused():
    other = {"function": LOSS, "through": "LanguageModule.set_input_tensor", "called_on": "maybe"}
    made = entry("lost", replaces(LOSS.replace("compute_language_model_loss", "_set_attention_backend"), other))
    with pytest.raises(PatchRefused, match="does not use .*_set_attention_backend the way the entry says"):
        registry((made, surface("lost"))).activate(plan("lost"))
