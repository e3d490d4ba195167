"""Modules that draw, or that look at the rest of the batch, in training mode: refused by name."""

import pytest
import torch
from diffusers.models.embeddings import LabelEmbedding
from peft import LoraConfig
from tiny import CHAIN, call, picture
from torch import nn

from mteditflow import trajectory_generators
from mteditflow.pipelines import LoraPolicies, Recorder, ReplayError


def lora_dropout(model):
    """Weak enough to pass as rounding of bfloat16 in a replay."""
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], lora_dropout=0.05)
    policies = LoraPolicies(model, config)
    with torch.no_grad():
        for weight in policies.parameters():
            weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return r"lora_dropout\.(current|old) \(Dropout\)"


def dropout(model):
    model.transformer_blocks[0].attn.to_out[1].p = 0.01
    return r"transformer_blocks.0.attn.to_out.1 \(Dropout\)"


def label_dropout(model):
    """A probability that is no module's, as of stochastic depth and of attention."""
    model.labels = LabelEmbedding(10, 16, dropout_prob=0.1)
    return r"labels \(LabelEmbedding\)"


def batch_norm(model):
    tokens = 10  # of the prompt
    model.context_embedder = nn.Sequential(model.context_embedder, nn.BatchNorm1d(tokens))
    return r"context_embedder.1 \(BatchNorm1d\)"


def edit(pipeline, **recording):
    with Recorder(pipeline, **recording):
        call(pipeline, [picture(pipeline)], [CHAIN[0][0]], trajectory_generators(0, 1), steps=2)


@pytest.mark.parametrize("add", [lora_dropout, dropout, label_dropout, batch_norm])
def test_refuses_modules_in_training_mode_by_name(pipeline, add):
    pipeline.to(torch.bfloat16)
    name = add(pipeline.transformer)
    pipeline.transformer.to(torch.bfloat16).train()
    before = pipeline.scheduler
    with pytest.raises(ReplayError, match=f"model: expected no .* in training mode, got .*{name}"):
        edit(pipeline, verify=False)
    assert pipeline.scheduler is before


@pytest.mark.parametrize("add", [lora_dropout, dropout, label_dropout, batch_norm])
def test_records_them_in_eval_mode(kontext, add):
    add(kontext.transformer)
    kontext.transformer.eval()
    edit(kontext)


def test_records_in_training_mode_what_has_nothing_to_draw(kontext):
    """As for gradient checkpointing."""
    LoraPolicies(kontext.transformer, LoraConfig(r=4, target_modules=["to_q"]))
    kontext.transformer.train()
    edit(kontext)
