"""Sibling of an editor: another transformer of the same architecture, such as a distilled one."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from typing import Any, cast

from diffusers import DiffusionPipeline

from mteditflow.pipelines.editor import Editor, compile_repeated
from mteditflow.pipelines.quantization import check_quantization
from mteditflow.pipelines.quantization import quantize as quantize_layers

OWN = ("transformer", "scheduler")  # components that a sibling does not share


def load_sibling(
    editor: Editor,
    source: str | os.PathLike[str],
    *,
    call: Mapping[str, Any] | None = None,
    compile_blocks: bool = False,
    quantize: str | None = None,
) -> Editor:
    """Load the transformer and scheduler of a sibling pipeline; the rest is the editor's own.

    Use it to sample with a distilled sibling while the base is trained, under an objective that
    needs no likelihood of the sampler (NFT, AWM, DPO). Both transformers have one configuration,
    and share text encoders and autoencoder, so that the base can be evaluated on the sibling's
    rollouts. Copy policies by ``LoraPolicies.load_state_dict``.

    Args:
        editor: editor whose autoencoder, text encoders and embeddings are shared.
        source: a directory or hub id in diffusers format, of the editor's class.
        call: call options that replace the editor's, such as fewer steps and no guidance.
        compile_blocks: ``torch.compile`` the repeated blocks, as ``Editor.load``.
        quantize: "int8" or "nf4", as ``Editor.load``.

    Returns:
        The sibling, frozen and in eval mode, in the dtype and on the device of the editor.

    Raises:
        ValueError: it is of another class, its transformer is configured differently, or an option
            is unknown or would change the embeddings.
        OSError: there is nothing at ``source``.

    Example:
        Roll out a distilled klein with the old policy of the base that is trained::

            base = Editor.load("black-forest-labs/FLUX.2-klein-base-9B", call=call)
            sibling = load_sibling(
                base, "black-forest-labs/FLUX.2-klein-9B", call={"num_inference_steps": 4}
            )
            config = base.lora(rank=64, alpha=128)
            policies = LoraPolicies(base.transformer, config)
            copies = LoraPolicies(sibling.transformer, config)
            copies.load_state_dict(policies.state_dict("old"))
            parts = sibling.roll_out(references, instructions, generators=generators, ...)
    """
    kind, own = type(editor.pipeline), cast(Any, editor.transformer)
    name = DiffusionPipeline.load_config(source)["_class_name"]
    if name != kind.__name__:
        raise ValueError(f"source: expected a {kind.__name__}, got a {name} in {source}")
    model = type(own)
    check_alike(model, model.load_config(source, subfolder="transformer"), own.config)
    if quantize is not None:
        check_quantization(quantize)
    options = editor.options_with(call)
    vae = editor.pipeline.vae
    shared = {key: x for key, x in editor.pipeline.components.items() if key not in OWN}
    pipeline = kind.from_pretrained(source, dtype=vae.dtype, **shared)
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer.eval().requires_grad_(False)
    if quantize is not None:
        quantize_layers(transformer, quantize, vae.device)
    transformer.to(vae.device)
    if compile_blocks:
        compile_repeated(transformer)
    return Editor(pipeline, editor.family, options, editor._prompts)


def _settings(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments in a configuration, with defaults, as JSON values."""
    known = inspect.signature(model.__init__).parameters
    defaults = {name: x.default for name, x in known.items() if name != "self"}
    given = {name: config.get(name, default) for name, default in defaults.items()}
    given["_class_name"] = config.get("_class_name", model.__name__)
    # As JSON values a tuple of defaults equals the list of a file.
    return cast("dict[str, Any]", json.loads(json.dumps(given, default=str)))


def check_alike(model: Any, sibling: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless two transformers of a class are configured alike.

    Args:
        model: class of both transformers.
        sibling: configuration of the sibling's transformer.
        trained: configuration of the transformer to train.
    """
    found, own = _settings(model, sibling), _settings(model, trained)
    differ = sorted(name for name, x in own.items() if found[name] != x)
    if differ:
        expected, got = (", ".join(f"{x} {values[x]!r}" for x in differ) for values in (own, found))
        raise ValueError(
            f"source: expected a transformer configured as the editor's ({expected}), got {got}: "
            "the editor could not be trained on what it samples"
        )
