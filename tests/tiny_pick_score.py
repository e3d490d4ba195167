"""A tiny CLIP of the real classes, as users hold PickScore."""

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZE = 32


def write_pick_score(path):
    """A CLIP of two layers with its tokenizer and processor; return the folder."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16).save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(path)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    text = layers | {"vocab_size": len(vocab), "max_position_embeddings": 16}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text | ends | {"pad_token_id": len(vocab) - 1, "intermediate_size": 32},
        vision_config=layers | {"image_size": SIZE, "patch_size": 8, "intermediate_size": 32},
        projection_dim=8,
        initializer_factor=5.0,
    )
    CLIPModel(config).save_pretrained(path)
    return path
