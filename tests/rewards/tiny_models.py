"""Tiny GroundingDINO and DINOv3 of the real classes, written to disk as their users hold them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    SwinConfig,
)

WORDS = ("a", "cat", "dog", "red", "ball", "tree", "sky", "the", "on", "of", "house", "car")
SPECIAL = {
    "[PAD]": 0,
    "[UNK]": 100,
    "[CLS]": 101,
    "[SEP]": 102,
    "[MASK]": 103,
    ".": 1012,
    "?": 1029,
}


def save_dinov3(path: Path) -> Path:
    """42 thousand weights; 4 registers, a 14 x 14 grid of patches."""
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=4,
        initializer_range=0.3,  # features that differ visibly
    )
    DINOv3ViTModel(config).save_pretrained(path)
    return path


def save_grounding_dino(path: Path) -> Path:
    """Sees 64 x 64 pixels; some of its 8 queries pass the threshold, and some do not."""
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    plain = [*WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocab = SPECIAL | {word: 1 + n for n, word in enumerate(plain) if word not in SPECIAL}
    vocab |= {f"[unused{n}]": n for n in range(1030) if n not in set(vocab.values())}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            vocab_size=1030,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        num_queries=8,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        d_model=64,
        init_std=0.05,
    )
    model = GroundingDinoForObjectDetection(config)
    for head in model.bbox_embed:  # zero at first, so that all boxes would have one size
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    model.save_pretrained(path)
    BertTokenizer(vocab=vocab).save_pretrained(path)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(
        path
    )
    return path
