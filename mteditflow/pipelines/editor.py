"""Editor that samples whole chains by calls of an unpatched pipeline, turn by turn."""

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

# Per kind of block: policies x with and without gradients x batch sizes x strides.
COMPILATIONS = 64


@dataclass(frozen=True)
class Part:
    """Finished trajectories of a rollout.

    Attributes:
        rows: rows of the batch.
        images: images of these rows after each turn, [b][N], RGB.
        rollout: their record, on the host, in the model's dtype.
    """

    rows: slice
    images: list[list[Image]]
    rollout: Rollout


class Editor:
    """Diffusers pipeline for training: samples chains of edits or images of texts.

    ``Editor.load`` accepts any class that edits an image by an instruction or generates one from a
    text; ``FAMILIES`` lists the classes with explicit support. The sampling pipeline of these holds
    no text encoders: each instruction is embedded once, and encoders are on the device only while
    they run. Qwen-Image-Edit's encoder also reads the image, so it runs again in every turn. A
    class that is not listed is called according to its signature; see ``assumptions``.

    A trajectory depends only on its reference, instructions, generator and the weights, up to the
    rounding of kernels in batches of another size (and of 8-bit images). It equals bit for bit the
    output of the full pipeline for the same reference, prompts and generator.

    Attributes:
        pipeline: the sampling pipeline, also for ``LoraPolicies.save``.
        family: family of its class.
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
        """Load a pipeline, frozen and in eval mode; its class determines its family.

        Args:
            source: a directory or hub id in diffusers format.
            dtype: dtype of all weights.
            device: device of transformer and VAE.
            call: options of every call: height, width, num_inference_steps, the guidance scale
                (named ``family.guidance``), max_sequence_length and any other argument of the
                pipeline's ``__call__``. Kontext encodes references at their own size unless
                ``_auto_resize`` is true. If height and width are None, the reference's are used.
            attention_backend: a name of diffusers' attention dispatcher, such as "flash" or
                "native"; diffusers sets it for the whole process.
            gradient_checkpointing: whether to recompute the blocks in the backward pass. It acts
                wherever gradients are enabled, also in eval mode, so sampling does not change and
                the model may stay in eval mode. Run the backward pass outside of
                ``LoraPolicies.use``.
            kept_blocks: number of last blocks that are not checkpointed: each costs the memory of
                its activations, and saves one forward pass of a block.
            compile_blocks: whether to ``torch.compile`` the repeated blocks at their first call;
                LoRA adapters may be added before that. Blocks are compiled again for every policy,
                with and without gradients, and for one and several rows, so torch's recompile limit
                (8) is raised to 64 for the whole process.
            vae_slicing: whether to decode one image at a time.
            vae_tiling: whether to decode in tiles, which changes the image slightly at their edges.
            quantize: "int8" or "nf4": store the linear layers in the blocks of transformer and text
                encoders in 8 or 4 bits. Embeddings and velocities then differ. None: do not.
            encoder_device: device on which text encoders run; None: ``device``, where they are only
                while they embed.
            prompt_cache: number of instructions whose embeddings stay on the host; at 512 tokens in
                bfloat16 each takes 4 MB (Kontext) or 13 MB (klein 9B).
            prompt_folder: folder in which embeddings are stored for this and other runs, one file
                each; None: none are stored.
            instructions: instructions to embed and store before the transformer is moved to the
                device, so that the device never holds text encoders and transformer together.

        Raises:
            ValueError: the pipeline takes an input that a chain of edits cannot provide, such as a
                mask, an option of ``call`` is unknown, the quantization package is missing,
                ``instructions`` are given without ``prompt_folder``, there are fewer blocks than
                ``kept_blocks`` or it is given without checkpointing, or embeddings cannot be
                stored, since they depend on images or every call computes them.
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
            # Before ``pipeline.to``: now the device still has room for the encoders.
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
        """Return the model in training."""
        return cast(nn.Module, self.pipeline.transformer)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Return the assumptions about a class that ``FAMILIES`` does not list; else ()."""
        if not self.family.assumptions:
            return ()
        targets = ", ".join(endings(self.family.layers(self.transformer, None)))
        return (*self.family.assumptions, f"LoRA adapters are on {targets} of every block")

    def reference_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Return width and height, in pixels, at which calls encode a reference of this size.

        None if they are unknown. Qwen-Image-Edit-Plus enlarges every reference to a megapixel,
        which dominates the cost of training.
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
        """Return the configuration of adapters for attention and feed-forward of all blocks.

        Args:
            rank: rank of the adapters, at least 1.
            alpha: numerator of the adapters' scale, alpha / rank.
            dropout: dropout probability in [0, 1); sampling has no dropout.
            targets: endings of the names of linear layers below the model's top level, such as
                "attn.to_q"; None: attention and feed-forward of all blocks.

        Raises:
            ValueError: the rank is below 1, or a target matches no layer of the model.
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
        """Edit chains and record them part by part, so that rewards can start with the first part.

        Samples the policy that is active when a part is requested, in eval mode. Kontext edits a
        part in one call per turn, with each distinct reference encoded once; Z-Image and Stable
        Diffusion 3.5 generate a part in one call. FLUX.2 and Qwen-Image-Edit, for which several
        images are several references of one edit, and classes that are not listed are called for
        one trajectory at a time.

        Args:
            references: RGB images, [B]; None each where ``family.references`` is "none".
            instructions: instructions, [B][N]; chains may differ in length. Text to image has one
                turn.
            generators: generators of initial and step noise, one per trajectory; later turns
                continue their streams.
            group: integer group of each trajectory, [B], on the CPU.
            batch: most trajectories of a part; a part ends early where the reference's size or the
                chain's length changes.
            solver: solver of the stochastic steps; None: the deterministic sampler.
            stochastic_steps: indices of the steps that may draw noise; None allows all.
            reduction: reduction of log-probs over elements, "mean" or "sum".
            verify: whether to prove on the first call that the record can be replayed, by one more
                forward pass.
            call: call options that replace those given to ``load``, such as another guidance scale.
            seen: input images of each turn, [B][N][number]: "last", the image of the turn before
                (at turn 1 the reference), "original", the reference, or a further RGB image. None:
                ["last"] each, the only choice for a family with one reference.

        Returns:
            The parts in order, each sampled when it is requested; ``Rollout.concatenate`` joins
            their records.

        Raises:
            ValueError: lengths differ, a chain is empty, ``batch`` is below 1, text to image is
                given several turns, an option is unknown or would change the embeddings, or
                ``seen`` names no image or more than the family takes.
            TypeError: a reference is no RGB image, or text to image has a reference.
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
                verify=verify and call.start == 0,  # one proof serves all calls
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
        """Edit chains with the pipeline's own deterministic sampler, as for an evaluation.

        Args:
            references: RGB images, [B]; None each where ``family.references`` is "none".
            instructions: instructions, [B][N]; chains may differ in length. Text to image has one
                turn.
            generators: generators of initial noise, one per trajectory.
            batch: most trajectories of a call, where the family takes several.
            call: call options that replace those given to ``load``, such as more steps.
            seen: input images of each turn, as in ``roll_out``.

        Returns:
            The images after each turn, [B][N].

        Raises:
            ValueError: as ``roll_out``; an option is unknown, or would change the embeddings.
            TypeError: a reference is no RGB image, or text to image has a reference.
        """
        options = self.options_with(call)
        chains = self._chains(references, instructions, generators, options, seen)
        calls = [part for rows in chains.parts(batch) for part in chains.calls(rows)]
        return [chain for rows in calls for chain in chains.sample(rows)]

    def options_with(self, call: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the options of every call, with those in ``call`` replaced.

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
    """Compile the repeated blocks, and raise torch's recompile limit for the whole process."""
    limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    torch._dynamo.config.recompile_limit = limit
    transformer.compile_repeated_blocks(fullgraph=True)


def _joined(rows: slice, recorded: Iterable[tuple[list[list[Image]], Rollout]]) -> Part:
    """Join the recorded calls of a part."""
    images, rollouts = zip(*recorded, strict=True)
    return Part(
        rows, [chain for chains in images for chain in chains], Rollout.concatenate(rollouts)
    )


def _load_pipeline(
    source: str | os.PathLike[str], family: Family, dtype: torch.dtype
) -> DiffusionPipeline:
    """Load the pipeline without its text components, on the host, frozen and in eval mode."""
    without = dict.fromkeys(family.text_parts)
    pipeline = family.pipeline.from_pretrained(source, dtype=dtype, **without)
    pipeline.set_progress_bar_config(disable=True)
    for module in modules_of(pipeline):
        module.eval().requires_grad_(False)
    return pipeline
