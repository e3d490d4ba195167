"""SDE sampling with a plain diffusers pipeline: only its scheduler is replaced.

    python examples/importing/sde_sampling.py

Shows `FlowMatchSDEScheduler`: noise in a window of steps, from a separate generator for each
trajectory; the recorded steps with their log-probs; and the effect of the noise level, as a
picture: one edit with a row of results per level, all from equal latents and random numbers.
Leaves out gradients: a replay needs the transformer's inputs, which `Recorder` stores.
"""

import torch
from mteditflow_examples.shapes.editor import call_options, load_editor
from mteditflow_examples.shapes.world import draw, make_chains
from PIL import Image

from mteditflow import FlowSDE, sliding_window, trajectory_generators
from mteditflow.pipelines import FlowMatchSDEScheduler

TRIES, STEPS, LEVELS, PIXEL = 8, 8, (0.0, 0.3, 0.7, 1.2), 6

pipe = load_editor("kontext")
pipe.scheduler = FlowMatchSDEScheduler.from_config(pipe.scheduler.config)

(chain,) = make_chains(1, turns=1, seed=3, split="held_out")
source = draw(chain.initial).expand(TRIES, -1, -1, -1)
prompt, options = [chain.instructions[0]] * TRIES, call_options(pipe, steps=STEPS)
latents = torch.randn(1, 36, 16, generator=torch.Generator().manual_seed(0)).expand(TRIES, -1, -1)
window = sliding_window(0, size=4, steps=STEPS)


def show(images: torch.Tensor) -> torch.Tensor:
    """Join a row of pictures side by side, with a gap between them."""
    return torch.cat([torch.nn.functional.pad(image, (1, 1, 1, 1)) for image in images], dim=2)


rows = []
for level in LEVELS:
    generators = trajectory_generators(0, TRIES)
    pipe.scheduler.sample_with(FlowSDE(level), generators=generators, stochastic_steps=window)
    images = pipe(image=source, prompt=prompt, latents=latents, **options).images
    steps = pipe.scheduler.steps
    log_prob = torch.stack([step.log_prob for step in steps], dim=1)  # [TRIES, STEPS]
    rows.append(show(torch.cat([source[:1], images])))
    noisy = [index for index, step in enumerate(steps) if step.stochastic]
    spread = images.std(dim=0).mean()
    print(
        f"noise level {level}: stochastic steps {noisy}, std between tries {spread:.3f}, "
        f"log-prob per element {log_prob.sum(dim=1).mean():+.2f}"
    )

picture = (torch.cat(rows, dim=1).movedim(0, -1) * 255).round().byte()
picture = picture.repeat_interleave(PIXEL, 0).repeat_interleave(PIXEL, 1)
Image.fromarray(picture.numpy()).save("sde_sampling.png")
print(f"{chain.instructions[0]!r}: source and {TRIES} tries, a row per level, in sde_sampling.png")
