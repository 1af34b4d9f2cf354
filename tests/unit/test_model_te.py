"""The te backend where Transformer Engine is not: it imports, so that arguments can be checked, and builds nothing."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.spec_utils import build_module

from megacpp_stp.errors import UserError
from megacpp_stp.model import te_modules
from megacpp_stp.model.specs import nam_te_stack_spec
from tests.unit.test_model_torch_backend import make_config


class Untouchable:
    """A layer that may not be built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("built")


def build() -> None:
    spec = nam_te_stack_spec
    layers = type(spec.submodules)(**dict.fromkeys(vars(spec.submodules), Untouchable))
    build_module(type(spec)(module=spec.module, params=spec.params, submodules=layers), make_config())


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]


@pytest.fixture
def no_transformer_engine(monkeypatch):
    before = {name: module for name, module in sys.modules.items() if name.startswith("transformer_engine")}
    forget()
    monkeypatch.setattr(te_modules, "HAVE_TE", False)
    yield monkeypatch
    forget()
    sys.modules.update(before)


@pytest.mark.skipif(te_modules.HAVE_TE, reason="Transformer Engine is installed")
def test_without_transformer_engine_nothing_is_built(no_transformer_engine):
    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value) == (
        "model.backend: Transformer Engine is not installed (got 'te')\n"
        "  fix: pip install --no-build-isolation 'megacpp-stp[te]', or use backend torch"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise ImportError('libcudnn.so.9: not found')", "cannot be imported: libcudnn.so.9: not found"),
        ("import a_module_that_is_not_there", "cannot be imported: No module named 'a_module_that_is_not_there'"),
        ("", "is a version that Megatron cannot use"),
    ],
)
def test_a_transformer_engine_that_megatron_could_not_import_is_named(no_transformer_engine, tmp_path, text, problem):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text(text)
    no_transformer_engine.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"Transformer Engine {problem}"):
        te_modules.require_transformer_engine()


def test_with_transformer_engine_the_stack_goes_on_to_its_layers(monkeypatch):
    """The refusal alone keeps layers from being built, and nothing else in the spec."""
    monkeypatch.setattr(te_modules, "HAVE_TE", True)
    reached = []
    monkeypatch.setattr(te_modules.NamStack, "__init__", lambda self, *args, **kwargs: reached.append(kwargs))
    build()
    assert list(reached[0]) == ["final_norm", "submodules"]


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_are_grouped_when_the_configuration_says_so(monkeypatch, grouped):
    given = {}

    def spec(**options):
        given.update(options)
        return lambda **kwargs: kwargs

    monkeypatch.setattr(te_modules, "get_moe_module_spec", spec)
    config = SimpleNamespace(moe_grouped_gemm=grouped)
    assert te_modules.te_experts(config, name="experts") == {"config": config, "name": "experts"}
    assert (given["use_te"], given["moe_grouped_gemm"]) == (True, grouped)
