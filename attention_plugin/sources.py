# SPDX-License-Identifier: Apache-2.0
"""What the source of a modeling file says about its attention: the only place that knows before anything has run.

transformers itself decides by the text of a modeling file whether a model may be given another implementation. The
questions here are of that kind. A file whose source cannot be had answers none of them: each function says what it
takes such a file for.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from transformers import PreTrainedModel

INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS(?:\.get_interface\(|\[(?![\"']))")
"""A call of the interface: as transformers writes it, or in brackets, as earlier releases and code on the Hub do."""

GATHERED = re.compile(
    r"\b(\w*attentions) (?:= \1 \+|\+=) \("  # all_attentions + (weights,)
    r"|\b\w*attentions\.append\(\("  # pairs of two streams (BridgeTower)
    r"|, projection_attentions = self\."  # of one layer beside the model (Kosmos-2)
)
"""How models collect attention weights themselves."""


@lru_cache
def source(module_name: str) -> str | None:
    """The text of a module, or None."""
    try:
        return inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return None


@lru_cache
def _tree(module_name: str) -> ast.Module:
    return ast.parse(source(module_name) or "")


@lru_cache
def layer_calls_interface(layer: Any) -> bool:
    """Whether the forward method of a class of layers is seen to call it."""
    try:
        return INTERFACE.search(inspect.getsource(layer.forward)) is not None
    except (AttributeError, OSError, TypeError):
        return False


@lru_cache
def gathers_weights_by_hand(module_name: str) -> bool:
    """Whether models of a file gather attention weights, or hand out those of one layer, without transformers' hooks.

    Whether their layers are told that weights are wanted then depends on the file.
    """
    return GATHERED.search(source(module_name) or "") is not None


@lru_cache
def layers_keeping_keywords(module_name: str) -> frozenset[tuple[str, str]]:
    """Layers of a file that hand a part of theirs the mask and the positions of the tokens, but not their `**kwargs`.

    Returns:
        The name of each such class, and that of the part.
    """
    if not calls_interface(module_name):
        return frozenset()
    layers = [node for node in _tree(module_name).body if isinstance(node, ast.ClassDef)]
    return frozenset((layer.name, part) for layer in layers for part in _parts_without_keywords(layer))


def _parts_without_keywords(layer: ast.ClassDef) -> Iterator[str]:
    for forward in layer.body:
        if isinstance(forward, ast.FunctionDef) and forward.name == "forward" and forward.args.kwarg:
            for call in (node for node in ast.walk(forward) if isinstance(node, ast.Call)):
                passed = {each.arg: each.value for each in call.keywords}  # None stands for `**kwargs`
                if {"hidden_states", "attention_mask", "position_ids"} <= passed.keys() and None not in passed:
                    part = re.fullmatch(r"self\.(\w+)", ast.unparse(call.func))
                    if part and ast.unparse(passed["attention_mask"]) == "attention_mask":
                        yield part[1]


def calls_interface(module_name: str) -> bool:
    """Whether a file is seen to call transformers' attention interface."""
    return INTERFACE.search(source(module_name) or "") is not None


@lru_cache
def leaves_attention(module_name: str) -> bool:
    """Whether a file leaves attention to transformers' interface, in some of its layers at least.

    A file without attention layers is made of other models, which are looked at in their turn. A file that cannot be
    read is given the benefit of the doubt: its masks still refuse to be computed with.
    """
    code = source(module_name)
    if code is None or INTERFACE.search(code):
        return True
    table = re.search(r"\w+_ATTENTION_CLASSES\s*(?:\[|=)", code)
    layers = re.search(r"^class \w*Attention\w*\((?:nn\.|torch\.nn\.)?Module", code, re.MULTILINE)
    return not table and not layers


@lru_cache
def models_from_tables(module_name: str) -> frozenset[str]:
    """Names of the model classes whose layers choose an attention class from a table, by the implementation's name.

    Such layers know the names in the table only, whatever other layers of the file do. A model made of other models is
    not among them: those are looked at in their turn.
    """
    module, code = sys.modules.get(module_name), source(module_name)
    if module is None or code is None or "_ATTENTION_CLASSES" not in code:
        return frozenset()
    classes = {node.name: node for node in _tree(module_name).body if isinstance(node, ast.ClassDef)}
    names = {name: {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} for name, node in classes.items()}
    models = {name for name in classes if _is_model(getattr(module, name, None))}
    found = {name for name, used in names.items() if any(each.endswith("_ATTENTION_CLASSES") for each in used)}
    while grown := {name for name, used in names.items() if used & (found - models)} - found:
        found |= grown
    return frozenset(found & models)


def _is_model(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, PreTrainedModel)


@lru_cache
def widens_masks(module_name: str) -> bool:
    """Whether a file adds columns to its mask where that is a tensor, and skips them in silence where it is not."""
    if not calls_interface(module_name):
        return False
    for node in ast.walk(_tree(module_name)):
        if isinstance(node, ast.If) and (name := _asked_to_be_a_tensor(node.test)):
            for each in ast.walk(node):
                targets = each.targets if isinstance(each, ast.Assign) else []
                if name in map(ast.unparse, targets) and re.search(r"\b(?:cat|pad)\(", ast.unparse(each)):
                    return True
    return False


@lru_cache
def measures_masks(module_name: str) -> bool:
    """Whether a file compares the size of its mask with that of its scores."""
    return re.search(r"mask\.size\(\) !=", source(module_name) or "") is not None


@lru_cache
def negates_masks(module_name: str) -> bool:
    """Whether a file negates its mask without asking whether it is boolean."""
    return re.search(r"mask\.logical_not\(\)", source(module_name) or "") is not None


@lru_cache
def is_causal_counts(module_name: str) -> bool:
    """Whether layers of a file may mean their `is_causal`, which eager attention never reads.

    Not where eager attention is the only implementation that the file's models support: nothing has read it then.
    """
    values = vars(sys.modules[module_name]).values() if module_name in sys.modules else ()
    models = [each for each in values if _is_model(each) and each.__module__ == module_name]
    return not models or any(each._supports_sdpa or each._supports_flash_attn for each in models)


def _asked_to_be_a_tensor(test: ast.expr) -> str | None:
    found = re.search(r"isinstance\((\w*mask), (?:torch\.)?Tensor\)", ast.unparse(test))
    return found[1] if found else None


@lru_cache
def eager_ignores(module_name: str, keyword: str) -> bool:
    """Whether eager attention of a file is seen not to read a keyword, which therefore cannot change the result.

    True only for a file that has such a function, as transformers' own have; all of them must ignore the keyword.
    """
    functions = [
        node
        for node in _tree(module_name).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("eager_attention_forward")
    ]
    return bool(functions) and calls_interface(module_name) and not any(_reads(node, keyword) for node in functions)


def _reads(function: ast.FunctionDef, keyword: str) -> bool:
    arguments = function.args
    if keyword in (each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)):
        return True
    # `**kwargs` that is used at all may be asked for anything.
    rest = arguments.kwarg.arg if arguments.kwarg else None
    return any(isinstance(each, ast.Name) and each.id == rest for each in ast.walk(function))
