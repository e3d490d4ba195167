"""Inputs, guidance and embeddings of a pipeline class, read from its signatures."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline

#: Inputs that a chain of edits cannot provide: a pipeline that takes one is refused.
FOREIGN = re.compile(
    "video|audio|frames|lyrics|mask_image|control_|task_prompt"
    "|^(images|layers|image_reference|reference_images)$"
)
#: Parameters of ``encode_prompt`` that a call sets by itself, always or not at all.
_SET_BY_CALLS = {
    *("self", "prompt", "device", "dtype", "lora_scale", "num_images_per_prompt"),
    *("do_classifier_free_guidance", "prompt_2", "prompt_3"),
}


def call_parameters(pipeline: type[DiffusionPipeline]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the pipeline's call, by name."""
    return inspect.signature(pipeline.__call__).parameters


def text_parameters(pipeline: type[DiffusionPipeline]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of its ``encode_prompt``, by name; none if it has no such method."""
    encode = getattr(pipeline, "encode_prompt", None)
    return {} if encode is None else inspect.signature(encode).parameters


def text_components(pipeline: type[DiffusionPipeline]) -> tuple[str, ...]:
    """Return the names of the components that only turn a prompt into embeddings."""
    names = inspect.signature(pipeline.__init__).parameters
    kinds = ("text_encoder", "tokenizer", "processor")
    return tuple(name for name in names if name.startswith(kinds))


def returned_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the variables that a function returns, "" for other expressions.

    The last ``return`` of the source is read; () if there is no source or no value.

    Example:
        >>> def encode_prompt(prompt_embeds, negative):
        ...     ids = prompt_embeds
        ...     return prompt_embeds.to("cpu"), negative if negative else None, ids
        >>> returned_names(encode_prompt)
        ('prompt_embeds', 'negative', 'ids')
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ()
    returns = [x.value for x in ast.walk(tree) if isinstance(x, ast.Return) and x.value]
    if not returns:
        return ()
    value = returns[-1]
    return tuple(map(_name, value.elts if isinstance(value, ast.Tuple) else [value]))


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.IfExp):
        return _name(node.body)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _name(node.func.value)
    return ""


def embedding_names(pipeline: type[DiffusionPipeline]) -> tuple[str, ...]:
    """Return the names of a call's arguments for the embeddings of a prompt, not a negative one.

    () where a call with embeddings might differ from one with the prompt: ``encode_prompt`` takes
    or returns what the call does not take, the call may rewrite the prompt, or the class does not
    show when it needs embeddings of a negative prompt.
    """
    call, text = call_parameters(pipeline), text_parameters(pipeline)
    returned = returned_names(pipeline.encode_prompt) if text else ()
    kept = [name for name in returned if not name.endswith("_ids")]
    taken = _SET_BY_CALLS | call.keys()
    rewrites = any("rewrite" in name or "enhance" in name for name in call)
    if rewrites or not kept or not call.keys() >= set(kept) or not taken >= text.keys():
        return ()
    guided = any(name.startswith("negative_") for name in call)
    if guided and not (tells_guidance(pipeline) or "true_cfg_scale" in call):
        return ()
    return tuple(name for name in kept if not name.startswith("negative_"))


def tells_guidance(pipeline: type[DiffusionPipeline]) -> bool:
    """Return whether its class has the property ``do_classifier_free_guidance``."""
    return isinstance(getattr(pipeline, "do_classifier_free_guidance", None), property)


def guidance_argument(pipeline: type[DiffusionPipeline]) -> str | None:
    """Return the name of the call's guidance scale; None if it has none.

    Where there are two, ``guidance_scale`` is an input of a guidance-distilled model. A default of
    None means that the published models have no such input, and ``true_cfg_scale`` is returned.
    """
    call = call_parameters(pipeline)
    names = [name for name in ("guidance_scale", "true_cfg_scale") if name in call]
    if len(names) == 2 and call["guidance_scale"].default is None:
        names.reverse()
    return names[0] if names else None


def foreign_inputs(pipeline: type[DiffusionPipeline]) -> Sequence[str]:
    """Return the inputs of its call that a chain of edits cannot provide."""
    return sorted(name for name in call_parameters(pipeline) if FOREIGN.search(name))
