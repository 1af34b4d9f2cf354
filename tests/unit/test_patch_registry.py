"""From a plan's list to active surfaces, and back: on the real megatron-core, with surfaces of the tests' own."""

from __future__ import annotations

import sys
from types import ModuleType

import megatron.core.datasets.utils as utils
import megatron.core.tensor_parallel as tensor_parallel
import megatron.core.tensor_parallel.cross_entropy as cross_entropy
import pytest
from megatron.core.models.common.language_module import language_module

from megacpp_stp.errors import UserError
from megacpp_stp.patches.contract import ProbeFailed, Replacement
from megacpp_stp.patches.judge import State
from megacpp_stp.patches.ledger import load_ledger
from megacpp_stp.patches.places import Place
from megacpp_stp.patches.records import PatchRefused
from megacpp_stp.patches.registry import Registry
from tests.unit.patch_surfaces import (
    CORE,
    CROSS_ENTROPY,
    CROSS_ENTROPY_CONSUMER,
    HELPERS,
    HELPERS_CONSUMER,
    LOSS,
    NORMALIZE,
    REEXPORT,
    entry,
    plan,
    registry,
    replaces,
    surface,
)

_BUILDER = "megatron.core.datasets.blended_megatron_dataset_builder:BlendedMegatronDatasetBuilder"
NORMALIZE_CONSUMERS = (
    {
        "function": "megatron.core.datasets.blended_dataset:BlendedDataset.__init__",
        "through": "normalize",
        "called_on": "maybe",
    },
    {
        "function": "megatron.core.datasets.blended_megatron_dataset_config:parse_and_normalize_split",
        "through": "normalize",
        "called_on": "maybe",
    },
    {
        "function": f"{_BUILDER}._build_blended_dataset_splits",
        "through": "normalize",
        "called_on": "maybe",
    },
)


def helpers(id: str = "helpers", **more):
    return entry(id, replaces(HELPERS, HELPERS_CONSUMER), **more)


def loss(id: str = "loss", **more):
    return entry(id, replaces(CROSS_ENTROPY, CROSS_ENTROPY_CONSUMER), **more)


def both() -> tuple[object, ...]:
    return (
        utils.compile_helpers,
        cross_entropy.vocab_parallel_cross_entropy,
        tensor_parallel.vocab_parallel_cross_entropy,
    )


@pytest.fixture(autouse=True)
def originals():
    """Whatever a test does, upstream is as it was."""
    before = both()
    yield before
    assert all(a is b for a, b in zip(both(), before, strict=True))


def test_a_surface_comes_to_be_active_and_goes_again(originals):
    surfaces = registry((helpers(), surface("helpers")))
    with surfaces.activate(plan("helpers")) as active:
        (record,) = active.records
        assert (record.state, record.core_version, record.reviewed_at) == (State.ACTIVE, "0.19.2", "0.19.2")
        assert record.probe == "every consumer calls it"
        assert utils.compile_helpers() == ("helpers", originals[0])
        assert active.calls() == {
            "helpers": {"tests.unit.test_patch_registry:test_a_surface_comes_to_be_active_and_goes_again": 1}
        }
    assert utils.compile_helpers is originals[0]
    active.undo()


def test_what_the_plan_does_not_list_is_never_applied(originals):
    surfaces = registry((helpers(), surface("helpers")), (loss(), surface("loss")))
    with surfaces.activate(plan()) as nothing:
        assert (both(), nothing.records) == (originals, ())
    with surfaces.activate(plan("loss")):
        assert utils.compile_helpers is originals[0]
        assert cross_entropy.vocab_parallel_cross_entropy is not originals[1]


def test_the_name_that_a_consumer_got_by_import_is_replaced_too(originals):
    """By its module alone, as other projects patch it, the model would go on to call the original."""
    with registry((loss(), surface("loss"))).activate(plan("loss")):
        seen = language_module.LanguageModule.compute_language_model_loss.__globals__["tensor_parallel"]
        assert seen.vocab_parallel_cross_entropy() == ("loss", originals[1])
        assert cross_entropy.vocab_parallel_cross_entropy is tensor_parallel.vocab_parallel_cross_entropy


def test_names_of_from_imports_are_replaced_in_each_consumers_own_globals():
    original = utils.normalize
    with registry((entry("n", replaces(NORMALIZE, *NORMALIZE_CONSUMERS)), surface("n"))).activate(plan("n")):
        modules = [sys.modules[consumer["function"].partition(":")[0]] for consumer in NORMALIZE_CONSUMERS]
        assert {module.normalize() for module in modules} == {("n", original)}
    assert all(module.normalize is original for module in modules)


def test_a_module_imported_later_gives_the_name_back(originals):
    with registry((helpers(), surface("helpers"))).activate(plan("helpers")):
        late = ModuleType("megatron.late")
        exec("from megatron.core.datasets.utils import compile_helpers", vars(late))
        sys.modules["megatron.late"] = late
    del sys.modules["megatron.late"]
    assert late.compile_helpers is originals[0]


def test_an_undeclared_name_in_a_loaded_module_is_refused(monkeypatch, originals):
    late = ModuleType("megatron.early")
    late.make = utils.compile_helpers
    monkeypatch.setitem(sys.modules, "megatron.early", late)
    with pytest.raises(PatchRefused, match="also bound, undeclared, as megatron.early:make"):
        registry((helpers(), surface("helpers"))).activate(plan("helpers"))


def test_a_consumer_that_finds_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(tensor_parallel, "vocab_parallel_cross_entropy", lambda: None)
    with pytest.raises(PatchRefused, match=f"{LOSS} does not find {CROSS_ENTROPY}"):
        registry((loss(), surface("loss"))).activate(plan("loss"))
    monkeypatch.undo()


def test_applying_twice_is_applying_once(originals):
    surfaces = registry((helpers(), surface("helpers")), (loss(), surface("loss")))
    with surfaces.activate(plan("helpers")) as first:
        replacement = utils.compile_helpers
        with surfaces.activate(plan("helpers", "loss")) as second:
            assert utils.compile_helpers is replacement
            assert [record.state for record in second.records] == [State.ACTIVE, State.ACTIVE]
        assert utils.compile_helpers is replacement
        assert cross_entropy.vocab_parallel_cross_entropy is originals[1]
    assert utils.compile_helpers is originals[0]
    with surfaces.activate(plan("helpers")) as again:
        assert again.records == first.records


def test_another_registry_does_not_apply_over_it():
    with registry((helpers(), surface("helpers"))).activate(plan("helpers")):
        stacked = registry((helpers("other"), surface("other")))
        with pytest.raises(PatchRefused, match="replaced already, by surface helpers"):
            stacked.activate(plan("other"))


def test_undo_is_in_reverse_order_and_checks_what_it_takes_away(originals):
    surfaces = registry((helpers(), surface("helpers")), (loss(), surface("loss")))
    active = surfaces.activate(plan("helpers", "loss"))
    ours, theirs = utils.compile_helpers, lambda: None
    utils.compile_helpers = theirs
    with pytest.raises(RuntimeError, match="compile_helpers is no longer the replacement of patch helpers"):
        active.undo()
    assert utils.compile_helpers is theirs
    assert cross_entropy.vocab_parallel_cross_entropy is not originals[1]  # nothing was undone
    utils.compile_helpers = ours
    active.undo()


def test_all_or_nothing(originals):
    def fails(probe):
        assert cross_entropy.vocab_parallel_cross_entropy is not originals[1]
        assert utils.compile_helpers is not originals[0]
        raise ProbeFailed("the gradient is zero")

    surfaces = registry((helpers(), surface("helpers")), (loss(), surface("loss", probe=fails)))
    with pytest.raises(PatchRefused, match="patch loss: refused: the gradient is zero") as caught:
        surfaces.activate(plan("helpers", "loss"))
    states = {record.id: record.state for record in caught.value.records}
    assert states == {"helpers": State.FINGERPRINT_OK, "loss": State.REFUSED}
    assert both() == originals


def test_a_place_that_keeps_what_it_has_is_refused(monkeypatch, originals):
    monkeypatch.setattr(Place, "set", lambda place, value: None)
    with pytest.raises(PatchRefused, match="compile_helpers cannot be replaced"):
        registry((helpers(), surface("helpers"))).activate(plan("helpers"))
    assert both() == originals


def test_a_probe_that_breaks_leaves_nothing_behind(originals):
    def breaks(probe):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        registry((helpers(), surface("helpers", probe=breaks))).activate(plan("helpers"))
    assert both() == originals


def test_a_probe_that_never_comes_to_the_new_code_proves_nothing():
    with pytest.raises(PatchRefused, match="its probe never came to the new code"):
        registry((helpers(), surface("helpers", probe=lambda probe: "fine"))).activate(plan("helpers"))


def test_calls_are_counted_by_the_consumer_that_made_them(originals):
    consumer = HELPERS_CONSUMER["function"]
    caller = ModuleType("megatron.training.initialize")
    exec("def _compile_dependencies(f):\n    return (lambda: f())()", vars(caller))
    with registry((helpers(), surface("helpers"))).activate(plan("helpers")) as active:
        assert active.calls() == {"helpers": {}}  # the probe's do not count
        caller._compile_dependencies(utils.compile_helpers)
        assert active.calls() == {"helpers": {consumer: 1}}


# --- refused before anything is replaced --------------------------------------------------------------------


def test_a_plan_that_does_not_need_it_is_refused():
    surfaces = registry((helpers(), surface("helpers", unneeded="it has no datasets")))
    with pytest.raises(PatchRefused, match="the plan lists it and does not need it: it has no datasets"):
        surfaces.activate(plan("helpers"))


@pytest.mark.parametrize("ids", [("helpers", "other"), ("other", "helpers")])
def test_conflicts_are_refused_whichever_declares_them(ids):
    surfaces = registry((helpers(conflicts=("other",)), surface("helpers")), (loss("other"), surface("other")))
    with pytest.raises(PatchRefused, match="conflicts with") as caught:
        surfaces.activate(plan(*ids))
    assert all(record.state is State.REFUSED for record in caught.value.records)
    with surfaces.activate(plan("helpers")):
        pass


def test_two_surfaces_of_one_target_need_an_order():
    pair = [(helpers(), surface("helpers")), (helpers("other"), surface("other"))]
    with pytest.raises(PatchRefused, match=f"replaces {HELPERS} too"):
        registry(*pair).activate(plan("helpers", "other"))


def test_the_declared_order_holds_against_the_plans(originals):
    applied = []

    def named(id):
        def replace(originals, hits):
            applied.append(id)
            return {HELPERS: Replacement(value=lambda: (id, originals[HELPERS]))}

        return surface(id, replace=replace)

    surfaces = registry((helpers("above", after=("below",)), named("above")), (helpers("below"), named("below")))
    with surfaces.activate(plan("above", "below")) as active:
        assert applied == ["below", "above"] == [record.id for record in active.records]
        name, original = utils.compile_helpers()
        assert name == "above"
        assert original() == ("below", originals[0])
    assert utils.compile_helpers is originals[0]
    with surfaces.activate(plan("above")):
        assert utils.compile_helpers() == ("above", originals[0])


def test_an_order_in_a_circle_is_refused():
    surfaces = registry((helpers("a", after=("b",)), surface("a")), (loss("b", after=("a",)), surface("b")))
    with pytest.raises(PatchRefused, match="each wants to be applied after another"):
        surfaces.activate(plan("a", "b"))


def test_a_surface_that_is_none_is_refused():
    for ids, problem in ((("helper",), "did you mean helpers"), (("helpers", "helpers"), "names a surface twice")):
        with pytest.raises(UserError, match=problem):
            registry((helpers(), surface("helpers"))).activate(plan(*ids))


def test_two_entries_of_one_id_are_refused():
    with pytest.raises(UserError, match="is declared twice"):
        Registry({"a": helpers("same"), "b": loss("same")})


def test_a_retired_surface_stops_the_launch():
    retired = helpers(retire={"when": [{"version": ">=0.19"}], "says": "upstream does it."})
    with pytest.raises(
        PatchRefused, match="retired: delete me: megatron-core 0.19.2 is >=0.19; upstream does it"
    ) as caught:
        registry((retired, surface("helpers"))).activate(plan("helpers"))
    assert "delete patches/helpers.yaml" in str(caught.value)
    assert caught.value.records[0].state is State.RETIRED


def test_nothing_is_replaced_once_a_model_exists(originals):
    class Model(language_module.LanguageModule):
        def __init__(self):
            pass

    surfaces = registry((helpers(), surface("helpers")))
    model = Model()
    with pytest.raises(PatchRefused, match=r"a model exists already, a .*Model"):
        surfaces.activate(plan("helpers"))
    assert both() == originals
    vars(model)["itself"] = model  # done with, but for the garbage collector
    del model
    with surfaces.activate(plan("helpers")):
        model = Model()
        with surfaces.activate(plan("helpers")):  # it is in place: nothing is replaced
            del model


def test_each_surface_may_configure_the_transformer():
    config = ModuleType("config")
    made = surface("helpers", configure=lambda config: setattr(config, "kernel", "ours"))
    with registry((helpers(), made), (loss(), surface("loss"))).activate(plan("helpers", "loss")) as active:
        active.configure(config)
    assert config.kernel == "ours"


# --- unreviewed ---------------------------------------------------------------------------------------------


def unreviewed() -> Registry:
    entries = helpers(reviewed={"0.19.2": dict.fromkeys((HELPERS, HELPERS_CONSUMER["function"]), "0" * 64)})
    return registry((entries, surface("helpers")), (loss(), surface("loss")))


def test_unreviewed_code_is_refused_and_can_be_allowed():
    surfaces = unreviewed()
    with pytest.raises(PatchRefused, match="not as reviewed in 0.19.2") as caught:
        surfaces.activate(plan("helpers"))
    assert "--allow-unreviewed helpers" in str(caught.value)
    with surfaces.activate(plan("helpers", "loss"), allow_unreviewed=("helpers",)) as active:
        allowed, reviewed = active.records
        assert (allowed.state, allowed.reviewed_at) == (State.ACTIVE, None)
        assert allowed.unreviewed == (HELPERS, HELPERS_CONSUMER["function"])
        assert allowed.warning is not None and HELPERS in allowed.warning
        assert (reviewed.unreviewed, reviewed.warning) == ((), None)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("loss", "has nothing unreviewed"), ("other", "no such patch"), ("spare", "is not in the plan")],
)
def test_a_permission_that_nothing_needs_is_refused(name, problem):
    surfaces = registry((loss(), surface("loss")), (helpers("spare"), surface("spare")))
    with pytest.raises(UserError, match=problem):
        surfaces.examine(plan("loss"), core=CORE, allow_unreviewed=(name,))


def test_examining_touches_nothing(originals):
    surfaces = registry((helpers(), surface("helpers")))
    (record,) = surfaces.examine(plan("helpers"), core=CORE)
    assert (record.state, both()) == (State.FINGERPRINT_OK, originals)


# --- the shipped ones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", load_ledger())
def test_the_code_of_each_entry_is_its_own(id):
    assert Registry.load().surface(id).id == id


def test_a_re_export_can_be_declared_without_a_consumer(originals):
    home = {**HELPERS_CONSUMER}
    re_export = ModuleType("megatron.again")
    re_export.compile_helpers = utils.compile_helpers
    sys.modules["megatron.again"] = re_export
    try:
        made = entry("helpers", replaces(HELPERS, home, also_bound=("megatron.again:compile_helpers",)))
        with registry((made, surface("helpers"))).activate(plan("helpers")):
            assert re_export.compile_helpers() == ("helpers", originals[0])
        assert re_export.compile_helpers is originals[0]
    finally:
        del sys.modules["megatron.again"]
    assert REEXPORT != HELPERS
