"""Imports that take long, done once in the process that ``tests.processes`` forks from."""

import accelerate  # noqa: F401
import fastapi  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import openai  # noqa: F401
import peft  # noqa: F401
import torch
import torch._dynamo
import torch.distributed
import typer  # noqa: F401
import uvicorn  # noqa: F401
from diffusers import Flux2KleinPipeline, FluxKontextPipeline  # noqa: F401
from mteditflow_examples import train_flux  # noqa: F401
from mteditflow_examples.shapes import scoring, served  # noqa: F401
from transformers import AutoModel, AutoTokenizer  # noqa: F401

import tests.undrawn  # noqa: F401

torch.set_num_threads(1)
