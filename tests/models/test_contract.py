"""The contract of architectures: every hook that a model defines is declared, is handed on, and has its signature."""

import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, isfunction, signature
from pathlib import Path
from typing import Protocol, get_args, get_origin, get_type_hints

import pytest

import thl_engine
from thl_engine.config import CONFIGS
from thl_engine.models import ARCHITECTURES, architecture, gemma3n, hrm_gemma3n
from thl_engine.models.contract import Architecture

PACKAGE = Path(thl_engine.__file__).parent
HOOKS = {field.name: field for field in fields(Architecture)}
TYPES = get_type_hints(Architecture)
OPEN = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)  # in a declaration: options of the architecture's own


def is_protocol(kind: object) -> bool:
    return isinstance(kind, type) and Protocol in kind.__mro__


def declared(hook: str) -> list[Parameter] | int | None:
    """Parameters of a hook, or how many it has; None for what is no function."""
    kinds = [kind for kind in (TYPES[hook], *get_args(TYPES[hook])) if kind is not type(None)]
    for kind in kinds:
        if get_origin(kind) is Callable:
            arguments = get_args(kind)[0]
            return None if arguments is ... else len(arguments)
        origin = get_origin(kind)
        call = origin.__call__ if is_protocol(origin) else None
        if call is not None:
            own = list(signature(call).parameters.values())[1:]
            return [parameter for parameter in own if parameter.kind not in OPEN]
    return None


def options_of(hook: Callable | None) -> set[str]:
    """Names of keyword arguments with a default that a hook has beyond the contract's."""
    if hook is None:
        return set()
    return {name for name, own in signature(hook).parameters.items() if own.kind is Parameter.KEYWORD_ONLY}


def module_of(model: str):
    return sys.modules[ARCHITECTURES[model].advance.__module__]


def test_every_configuration_has_its_architecture():
    assert ARCHITECTURES.keys() == CONFIGS.keys()
    assert all(architecture(name).model_type == name for name in CONFIGS)


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_hooks_have_the_declared_signatures(model):
    for name in HOOKS:
        hook, wanted = getattr(ARCHITECTURES[model], name), declared(name)
        if hook is None or wanted is None:
            continue
        found = list(signature(hook).parameters.values())
        if isinstance(wanted, int):
            assert len(found) == wanted, name
            continue
        common, own = found[: len(wanted)], found[len(wanted) :]
        assert [(p.name, p.kind) for p in common] == [(p.name, p.kind) for p in wanted], name
        for mine, theirs in zip(common, wanted, strict=True):
            assert mine.default == theirs.default or theirs.default is Parameter.empty, f"{name}: {mine.name}"
        for parameter in own:
            assert parameter.kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD), f"{name}: {parameter.name}"
            assert parameter.kind is Parameter.VAR_KEYWORD or parameter.default is not Parameter.empty, name


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_options_are_those_of_the_functions(model):
    own = ARCHITECTURES[model]
    assert options_of(own.init_state) == set(own.state_options)
    assert set(own.forward_inputs) <= options_of(own.forward)
    assert options_of(own.walk) <= set(own.state_options)
    assert options_of(own.with_options) <= set(own.state_options)
    if own.forward_walk is not None:
        takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in signature(own.forward_walk).parameters.values())
        assert takes_any or set(own.forward_inputs) <= options_of(own.forward_walk)


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_no_hook_is_left_out(model):
    """A module's function of a hook's name is that hook; one that takes a configuration has at least a caller."""
    module, sources = module_of(model), "\n".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    for name, value in vars(module).items():
        if name.startswith("_") or not isfunction(value) or value.__module__ != module.__name__:
            continue
        if name in HOOKS:
            assert getattr(ARCHITECTURES[model], name) is value, name
        elif next(iter(signature(value).parameters), None) == "config":
            assert len(re.findall(rf"\b{name}\b", sources)) > 1, f"{name}: no hook, and nothing calls it"


def test_what_is_built_on_another_hands_its_hooks_on():
    base, built = gemma3n.ARCHITECTURE, hrm_gemma3n.ARCHITECTURE
    replaced = {name for name in HOOKS if getattr(base, name) is not getattr(built, name)}
    for name in ("aliases", "touched", "traffic", "chunk", "head", "logits", "check_room", "longest"):
        assert name not in replaced, name


def test_required_hooks_have_no_default():
    required = {name for name, own in HOOKS.items() if own.default is MISSING and own.default_factory is MISSING}
    assert required == {
        "model_type", "blocks", "initial", "walk", "head", "workspace", "attended", "init_state", "state_from_dict",
        "advance", "logits",
    }  # fmt: skip


def test_nothing_probes_models():
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"(hasattr|getattr)\((self\.)?_?(model|module|arch\w*|state|config|ops)\b", text), (
            file.name
        )
        assert "except TypeError" not in text or file.name in ("token_stream.py",), file.name
