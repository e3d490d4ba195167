"""An editor that samples whole chains: its unpatched pipeline is called turn by turn."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL.Image import Image
from torch import Tensor, nn

from mteditflow._checks import check_count, check_shape
from mteditflow.flow.solvers import Solver
from mteditflow.pipelines.chain_calls import ChainCalls, Seen
from mteditflow.pipelines.checkpointing import enable_checkpointing
from mteditflow.pipelines.families import Family, endings, find_family
from mteditflow.pipelines.prompts import (
    Instruction,
    Prompts,
    check_text_options,
    load_prompts,
    modules_of,
)
from mteditflow.pipelines.quantization import check_quantization
from mteditflow.pipelines.quantization import quantize as quantize_layers
from mteditflow.pipelines.recorder import Recorder
from mteditflow.pipelines.rollout import Rollout

COMPILATIONS = 64  # of one kind of block: policies x gradients or none x batch sizes x strides


@dataclass(frozen=True)
class Part:
    """Finished trajectories of a rollout.

    Attributes:
        rows: which of the batch.
        images: their images after each turn, [b][N], RGB.
        rollout: their record, on the host, in the model's dtype.
    """

    rows: slice
    images: list[list[Image]]
    rollout: Rollout


class Editor:
    """A diffusers pipeline for training: chains of edits or images of texts, recorded or not.

    Made by ``Editor.load``, of any class that edits an image by an instruction or makes one from a
    text; ``FAMILIES`` lists those that are known by name. Their sampling pipeline holds no text
    encoders: instructions are embedded once each, and encoders are on the device only while they
    work. Qwen-Image-Edit's encoder is shown the image too, so it works once more in every turn. A
    class that is not listed is called as its signature says; ``assumptions`` states how.

    A trajectory depends on its reference, its instructions, its generator and the weights alone, up
    to the rounding of kernels in batches of another size (and of 8-bit images). It equals bit for
    bit the output of the full pipeline for the same reference, prompts and generator.

    Attributes:
        pipeline: the sampling pipeline; for ``LoraPolicies.save`` too.
        family: the family of its class.
        options: options of every call of the pipeline.

    Example:
        GRPO on Kontext::

            editor = Editor.load(
                "black-forest-labs/FLUX.1-Kontext-dev",
                dtype=torch.bfloat16, device="cuda", call={"num_inference_steps": 6},
            )
            policies = LoraPolicies(editor.transformer, editor.lora(rank=64, alpha=128))
            for part in editor.roll_out(
                references, instructions, generators=generators, group=group, batch=4,
                solver=FlowSDE(0.9), stochastic_steps=range(5),
            ):
                submit_for_rewards(part.rows, part.images)
                rollouts.append(part.rollout)
            rollout = Rollout.concatenate(rollouts)
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: Family,
        call: Mapping[str, Any],
        prompts: Prompts[Instruction] | None,
    ) -> None:
        self.pipeline, self.family, self.options = pipeline, family, family.call_options(call)
        self._call, self._prompts = dict(call), prompts

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        call: Mapping[str, Any] | None = None,
        attention_backend: str | None = None,
        gradient_checkpointing: bool = False,
        kept_blocks: int = 0,
        compile_blocks: bool = False,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        quantize: str | None = None,
        encoder_device: torch.device | str | None = None,
        prompt_cache: int = 256,
        prompt_folder: str | os.PathLike[str] | None = None,
        instructions: Iterable[str] = (),
    ) -> Editor:
        """Load a pipeline, in eval mode and frozen; its family is read off its class.

        Args:
            source: a directory or hub id in diffusers format.
            dtype: of all weights.
            device: of transformer and VAE.
            call: options of every call: height, width, num_inference_steps, the scale of
                guidance (``family.guidance`` is its name), max_sequence_length and whatever else
                the pipeline's ``__call__`` has. Kontext takes references in the size they have
                unless ``_auto_resize`` is true. Height and width None are those of the reference.
            attention_backend: a name of diffusers' attention dispatcher, such as "flash" or
                "native"; diffusers sets it for the whole process.
            gradient_checkpointing: recompute the blocks in the backward pass. It acts wherever
                gradients are enabled, in eval mode too, so sampling is untouched and the model may
                stay in eval mode. Run the backward pass outside of ``LoraPolicies.use``.
            kept_blocks: blocks, the last ones, that checkpointing leaves out: each costs the memory
                of its activations and spares its forward pass in the backward pass.
            compile_blocks: ``torch.compile`` the repeated blocks, at their first call; LoRA
                adapters may still be added before it. Every policy compiles anew, with and without
                gradients and for one and for more rows, so torch's recompile limit (8) is raised
                to 64, for the whole process.
            vae_slicing: decode one image at a time.
            vae_tiling: decode in tiles, which changes the image slightly where tiles meet.
            quantize: "int8" or "nf4": hold the linear layers in the blocks of transformer and text
                encoders in 8 or 4 bits. Embeddings and velocities differ from the plain model's.
            encoder_device: where text encoders work; None: on ``device``, only while they embed.
            prompt_cache: embeddings of how many instructions to keep on the host; at 512 tokens in
                bfloat16 one takes 4 MB (Kontext) or 13 MB (klein 9B).
            prompt_folder: folder to store embeddings in, for this run and others; a file each. None
                stores none.
            instructions: to embed and store before the transformer is moved to the device, so that
                text encoders never share its memory with it.

        Raises:
            ValueError: the pipeline takes what a chain of edits has not, such as a mask, an option
                of ``call`` is unknown, the package that quantizes is missing, there are
                instructions and no ``prompt_folder``, there are fewer blocks than
                ``kept_blocks`` or none is recomputed, or embeddings cannot be stored ahead, since
                they depend on images or every call makes them.
            OSError: there is nothing at ``source``, or ``prompt_folder`` cannot be written.
        """
        family = find_family(DiffusionPipeline.load_config(source)["_class_name"])
        options = family.call_options(call or {})
        if quantize is not None:
            check_quantization(quantize)
        ahead = [Instruction(text) for text in instructions]
        if kept_blocks and not gradient_checkpointing:
            raise ValueError(
                f"kept_blocks: expected 0 without gradient_checkpointing, got {kept_blocks}"
            )
        check_text_options(family, encoder_device, prompt_folder, ahead)
        pipeline = _load_pipeline(source, family, dtype)
        prompts = None
        if family.embeddings:
            where = device if encoder_device is None else encoder_device
            prompts = load_prompts(
                source,
                family,
                dtype,
                where,
                options=options,
                capacity=prompt_cache,
                quantize_to=quantize,
                folder=prompt_folder,
            )
            if ahead:
                negative = family.negative_prompt(pipeline, options)
                ahead += [] if negative is None else [Instruction(negative, negative=True)]
                prompts.prepare(ahead)
        if quantize is not None:
            for name, part in pipeline.components.items():
                if name == "transformer" or (part is not None and name.startswith("text_encoder")):
                    quantize_layers(part, quantize, torch.device(device))
        pipeline.to(device)
        if attention_backend is not None:
            pipeline.transformer.set_attention_backend(attention_backend)
        if gradient_checkpointing:
            enable_checkpointing(pipeline.transformer, kept_blocks)
        if compile_blocks:
            compile_repeated(pipeline.transformer)
        if vae_slicing:
            pipeline.vae.enable_slicing()
        if vae_tiling:
            pipeline.vae.enable_tiling()
        return cls(pipeline, family, call or {}, prompts)

    @property
    def transformer(self) -> nn.Module:
        """The model in training."""
        return cast(nn.Module, self.pipeline.transformer)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Assumptions about a class that is not listed in ``FAMILIES``; () of one that is."""
        if not self.family.assumptions:
            return ()
        targets = ", ".join(endings(self.family.layers(self.transformer, None)))
        return (*self.family.assumptions, f"LoRA adapters belong to {targets} of every block")

    def reference_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height, pixels, at which calls encode a reference of this size; None: unknown.

        Qwen-Image-Edit-Plus enlarges each to a megapixel, which decides what training costs.
        """
        size = self.family.reference_size
        return None if size is None else size(self.pipeline, (width, height), self.options)

    def lora(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
    ) -> LoraConfig:
        """Adapters for attention and feed-forward of all blocks, or for what ``targets`` names.

        Args:
            rank: of the adapters, at least 1.
            alpha: their scale is alpha / rank.
            dropout: in [0, 1); sampling goes without.
            targets: how the names of linear layers end, below the model's top level, such as
                "attn.to_q"; None is attention and feed-forward of all blocks.

        Raises:
            ValueError: a target matches no layer of the model.
        """
        check_count("rank", rank)
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            init_lora_weights="gaussian",
            target_modules=self.family.layers(self.transformer, targets),
        )

    def roll_out(
        self,
        references: Sequence[Image | None],
        instructions: Sequence[Sequence[str]],
        *,
        generators: Sequence[torch.Generator],
        group: Tensor,
        batch: int,
        solver: Solver | None = None,
        stochastic_steps: Collection[int] | None = None,
        reduction: str = "mean",
        verify: bool = True,
        call: Mapping[str, Any] | None = None,
        seen: Sequence[Seen] | None = None,
    ) -> Iterator[Part]:
        """Edit chains and record them, part by part, so that rewards can begin with the first.

        Samples the policy that is active when a part is requested, in eval mode. Kontext edits a
        part in one call per turn, each distinct reference encoded once; Z-Image and Stable
        Diffusion 3.5 make a part in one call. FLUX.2, Qwen-Image-Edit and classes that are not
        listed are called for one trajectory at a time: the former take several images for several
        references of one edit.

        Args:
            references: RGB images, [B]; None each where ``family.references`` is "none".
            instructions: [B][N]; chains may differ in length. Text to image has one turn.
            generators: of initial and step noise, one per trajectory; its stream goes on over
                turns.
            group: integer group of each trajectory, [B], on the CPU.
            batch: trajectories of a part, at most: a part ends early where the reference's size or
                the chain's length changes.
            solver: of stochastic steps; None is the deterministic sampler.
            stochastic_steps: indices of the steps that may draw noise; None allows all.
            reduction: of log-probs over elements, "mean" or "sum".
            verify: prove on the first call that the record can be replayed, by one more forward.
            call: call options that replace those given to ``load``, such as another guidance.
            seen: images that each turn is given, [B][N][number]: "last", that of the turn before
                (at turn 1 the reference), "original", the reference, or a further RGB image. None:
                ["last"] each, which is all that a family of one reference takes.

        Returns:
            The parts in order, each sampled when it is requested; ``Rollout.concatenate`` joins
            their records.

        Raises:
            ValueError: lengths differ, a chain is empty, ``batch`` is below 1, text to image is
                given several turns, an option is unknown or would change the embeddings, or
                ``seen`` names no image or more than the family takes.
            TypeError: a reference is no RGB image, or it is one of text to image.
            ReplayError: while iterating, if a recording could not be replayed.
        """
        check_count("batch", batch)
        check_shape("group", group, [len(references)], "[B]")
        chains = self._chains(references, instructions, generators, self.options_with(call), seen)

        def record(call: slice) -> tuple[list[list[Image]], Rollout]:
            recorder = Recorder(
                self.pipeline,
                solver,
                generators=generators[call],
                stochastic_steps=stochastic_steps,
                reduction=reduction,
                storage="cpu",
                verify=verify and call.start == 0,
            )
            with recorder:
                images = chains.sample(call)
            return images, recorder.rollout(group=group[call])

        return (_joined(rows, map(record, chains.calls(rows))) for rows in chains.parts(batch))

    def edit(
        self,
        references: Sequence[Image | None],
        instructions: Sequence[Sequence[str]],
        *,
        generators: Sequence[torch.Generator],
        batch: int,
        call: Mapping[str, Any] | None = None,
        seen: Sequence[Seen] | None = None,
    ) -> list[list[Image]]:
        """Edit chains by the pipeline's own deterministic sampler, as for an evaluation.

        Args:
            references: RGB images, [B]; None each where ``family.references`` is "none".
            instructions: [B][N]; chains may differ in length. Text to image has one turn.
            generators: of initial noise, one per trajectory.
            batch: trajectories of a call at most, where the family takes several.
            call: call options that replace those given to ``load``, such as more steps.
            seen: images that each turn is given, as in ``roll_out``.

        Returns:
            The images after each turn, [B][N].

        Raises:
            ValueError: as ``roll_out``; an option is unknown, or would change the embeddings.
            TypeError: a reference is no RGB image.
        """
        options = self.options_with(call)
        chains = self._chains(references, instructions, generators, options, seen)
        calls = [part for rows in chains.parts(batch) for part in chains.calls(rows)]
        return [chain for rows in calls for chain in chains.sample(rows)]

    def options_with(self, call: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the options of calls, some of them replaced.

        Raises:
            ValueError: one is unknown, or would change the embeddings.
        """
        given = self.family.call_options({**self._call, **(call or {})})
        if self.family.text_options(given) != self.family.text_options(self.options):
            raise ValueError(
                f"call: expected no options of text encoding, got {sorted(call or {})}"
            )
        return given

    def _chains(
        self,
        references: Sequence[Image | None],
        instructions: Sequence[Sequence[str]],
        generators: Sequence[torch.Generator],
        options: Mapping[str, Any],
        seen: Sequence[Seen] | None,
    ) -> ChainCalls:
        return ChainCalls(
            self.pipeline,
            self.family,
            options,
            self._prompts,
            references,
            instructions,
            generators,
            seen,
        )


def compile_repeated(transformer: Any) -> None:
    """Compile the repeated blocks, and raise torch's recompile limit for the process."""
    limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    torch._dynamo.config.recompile_limit = limit
    transformer.compile_repeated_blocks(fullgraph=True)


def _joined(rows: slice, recorded: Iterable[tuple[list[list[Image]], Rollout]]) -> Part:
    """The calls of a part as one."""
    images, rollouts = zip(*recorded, strict=True)
    return Part(
        rows, [chain for chains in images for chain in chains], Rollout.concatenate(rollouts)
    )


def _load_pipeline(
    source: str | os.PathLike[str], family: Family, dtype: torch.dtype
) -> DiffusionPipeline:
    """The pipeline without its text parts, on the host, frozen, quiet and in eval mode."""
    without = dict.fromkeys(family.text_parts)
    pipeline = family.pipeline.from_pretrained(source, dtype=dtype, **without)
    pipeline.set_progress_bar_config(disable=True)
    for module in modules_of(pipeline):
        module.eval().requires_grad_(False)
    return pipeline
