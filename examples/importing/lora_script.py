"""DiffusionNFT in a LoRA training script like those of diffusers; added lines end in `# +`.

    python examples/importing/lora_script.py

A script such as diffusers' train_dreambooth_lora_flux_kontext.py fits an adapter to pairs of
pictures by flow matching. Here the target pictures are the model's own results, eight per edit, and
each has a reward, so the model trains on good and bad results. Only the loss changes; the old
policy is the model with its adapter disabled.

Left out: saving, resuming, validation, caption dropout, mixed precision and offloading; and further
rounds with new results of the trained model, as in `train_flux.py`. The model is a tiny
FLUX.1-Kontext of the real classes, and the edits are those of the shapes world.
"""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FluxKontextPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from mteditflow_examples.shapes.editor import TEXT_TOKENS, call_options, load_editor
from mteditflow_examples.shapes.rewards import Truth, score
from mteditflow_examples.shapes.world import Chain, draw, make_chains
from peft import LoraConfig

from mteditflow import group_advantage, nft_loss, optimality_probability  # +

EDITS, TRIES, STEPS, BATCH = 128, 8, 64, 32
WEIGHTING, LOGIT_MEAN, LOGIT_STD = "logit_normal", 1.0, 1.0


def try_edits(
    pipe: FluxKontextPipeline, chains: list[Chain], generator: torch.Generator
) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return prompts, sources, results, and rewards in [0, 2]: following plus whole picture."""
    prompts = [chain.instructions[0] for chain in chains]
    sources = torch.stack([draw(chain.initial) for chain in chains])
    images = pipe(image=sources, prompt=prompts, generator=generator, **call_options(pipe)).images
    scores = score(images[:, None], Truth.of(chains))
    return prompts, sources, images, (scores.likert[:, 0] - 1) / 4 + scores.strict[:, 0].float()


set_seed(0)
accelerator = Accelerator(cpu=True)
generator = torch.Generator().manual_seed(0)
pipe = load_editor("kontext")
transformer, vae, scheduler = pipe.transformer, pipe.vae, copy.deepcopy(pipe.scheduler)
train = [
    chain for chain in make_chains(EDITS, turns=1, seed=0, split="train") for _ in range(TRIES)
]
held_out = make_chains(256, turns=1, seed=0, split="held_out")
prompts, sources, images, reward = try_edits(pipe, train, generator)
before = try_edits(pipe, held_out, torch.Generator().manual_seed(1))[-1].mean()
advantage = group_advantage(reward, torch.arange(EDITS).repeat_interleave(TRIES))  # +

transformer.requires_grad_(False)
transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
trained = [weight for weight in transformer.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
lr_scheduler = get_scheduler("cosine", optimizer, num_training_steps=STEPS, num_warmup_steps=0)
transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)

with torch.no_grad():
    embeds, pooled, text_ids = pipe.encode_prompt(prompts, None, max_sequence_length=TEXT_TOKENS)
    latents, conditions = (vae.encode(2 * x - 1).latent_dist.mode() for x in (images, sources))
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    latents, conditions = ((x - shift) * scale for x in (latents, conditions))
side = latents.shape[-1] // 2
latent_ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
condition_ids = latent_ids.clone()
condition_ids[:, 0] = 1

for step in range(STEPS):
    rows = torch.randint(len(latents), (BATCH,), generator=generator)
    model_input = pipe._pack_latents(latents[rows], BATCH, *latents.shape[1:])
    condition = pipe._pack_latents(conditions[rows], BATCH, *latents.shape[1:])
    noise = torch.randn(model_input.shape, generator=generator)
    u = compute_density_for_timestep_sampling(
        WEIGHTING, BATCH, LOGIT_MEAN, LOGIT_STD, generator=generator
    )
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[indices][:, None, None]
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise

    inputs = {
        "hidden_states": torch.cat([noisy_model_input, condition], dim=1),
        "timestep": timesteps / 1000,
        "pooled_projections": pooled[rows],
        "encoder_hidden_states": embeds[rows],
        "txt_ids": text_ids,
        "img_ids": torch.cat([latent_ids, condition_ids]),
        "return_dict": False,
    }
    model_pred = transformer(**inputs)[0][:, : model_input.shape[1]]
    weighting = compute_loss_weighting_for_sd3(WEIGHTING, sigmas=sigmas)
    target = noise - model_input

    # Before: loss = (weighting * (model_pred - target) ** 2).mean()
    transformer.disable_adapters()  # +
    with torch.no_grad():  # +
        old_pred = transformer(**inputs)[0][:, : model_input.shape[1]]  # +
    transformer.enable_adapters()  # +
    r = optimality_probability(advantage[rows], advantage_max=2.5)  # +
    loss = nft_loss(model_pred, old_pred, target, r, nft_beta=0.1)  # +
    loss = (weighting.flatten() * loss).mean()  # +

    accelerator.backward(loss)
    accelerator.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.detach():.3f}")

after = try_edits(pipe, held_out, torch.Generator().manual_seed(1))[-1].mean()
print(f"reward on held-out edits: before {before:.3f}, after {after:.3f}, of 2")
