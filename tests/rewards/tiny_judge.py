"""A Qwen3-VL of the real classes on disk, whose weights make it say one given sentence.

Its blocks add nothing to the residual stream, so the next token depends on the last one alone; the
head then maps the line break that ends every prompt to a token that stands for the sentence, and
that token to the end of the message. Processor, chat template, images and generation are the real
ones: what a server does with a request is what it would do for a trained model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import torch
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mteditflow.testing.endpoint import closed_port

CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{% if part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}
{%- if "text" in part %}{{ part.text }}{% endif %}
{%- endfor -%}
{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
HIDDEN = 64
PATCH, MERGE = 16, 2
# Beside a CPU build of torch, torchvision's own operators and its decoder of images cannot be
# loaded: the former are declared, so that it can be imported, and Pillow decodes instead.
SHIM = """\
import torch
if torch.version.cuda is None:
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    import io, numpy, torchvision.io
    from PIL import Image

    def decode_image(data, **options):
        image = Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)

    torchvision.io.decode_image = decode_image
"""


def save(folder: Path, sentence: str) -> Path:
    """Write model, tokenizer and processor."""
    letters = list(bytes_to_unicode().values())
    vocab = {token: i for i, token in enumerate([*letters, *CONTROL, sentence])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token="<|im_end|>",
        additional_special_tokens=list(CONTROL),
        chat_template=TEMPLATE,
    )
    tokenizer.add_tokens([sentence])
    tokenizer.save_pretrained(folder)
    _model(vocab, sentence).save_pretrained(folder)
    _write_processor(folder)
    return folder


def _model(vocab: dict[str, int], sentence: str) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(vocab),
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
    )
    model = Qwen3VLForConditionalGeneration(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding.normal_()
        head.zero_()
        head[vocab[sentence]] = embedding[vocab[bytes_to_unicode()[ord("\n")]]]
        head[vocab["<|im_end|>"]] = embedding[vocab[sentence]]
    end = vocab["<|im_end|>"]
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=False)
    return model


def _write_processor(folder: Path) -> None:
    """As files: the class itself needs torchvision, which the server's process alone has."""
    common = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 2**20},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    image = common | {"image_processor_type": "Qwen2VLImageProcessor"}
    video = common | {"video_processor_type": "Qwen3VLVideoProcessor"}
    processor = {"processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    (folder / "processor_config.json").write_text(json.dumps(processor))


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Run `transformers serve` on a model; the URL of its endpoint."""
    shim = folder.parent / "shim"
    shim.mkdir(exist_ok=True)
    (shim / "sitecustomize.py").write_text(SHIM)
    port = closed_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(shim), str(Path(sys.prefix) / "serving")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = folder.parent / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            if httpx2.get(url).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"transformers serve did not come up:\n{log.read_text()[-3000:]}")
