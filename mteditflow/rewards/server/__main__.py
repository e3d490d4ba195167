"""Serve content consistency: ``python -m mteditflow.rewards.server --help``."""

from __future__ import annotations

import logging
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mteditflow._command import OneLineCommand
from mteditflow._exits import naming_argument, refusing
from mteditflow._hub import explaining_hub
from mteditflow.rewards.command_line import check_device, check_source, read_secret
from mteditflow.rewards.consistency.scorer import ConsistencyScorer
from mteditflow.rewards.consistency.wire import Limits
from mteditflow.rewards.server.app import DEFAULT_LIMITS, create_app
from mteditflow.rewards.server.serving import serve

TOKEN_VARIABLE = "MTEDITFLOW_TOKEN"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Tokens(str, Enum):
    """Choices of ``tokens`` of ``ConsistencyScorer``."""

    strict = "strict"
    compat = "compat"


def load(
    detector: str, features: str, tokens: Tokens, threshold: float, device: str
) -> ConsistencyScorer:
    """Load the scorer with the published models, or others of their classes."""
    # Not at the top: importing transformers takes seconds.
    from mteditflow.rewards.consistency.models import DinoV3, GroundingDino

    with explaining_hub("detector", detector):
        boxes = GroundingDino.from_pretrained(detector, device=device, threshold=threshold)
    with explaining_hub("features", features):
        dino = DinoV3.from_pretrained(features, device=device)
    return ConsistencyScorer(boxes, dino, tokens=tokens.value)


def read_token(file: Path | None) -> str | None:
    """Return the token from a file or the environment; a command line is visible to other users.

    Raises:
        ValueError: the token is empty, or the file is not text.
        OSError: the file cannot be read.
    """
    token = read_secret(TOKEN_VARIABLE) if file is None else file.read_text("utf-8").strip()
    if token == "":
        where = TOKEN_VARIABLE if file is None else file
        raise ValueError(f"token: expected one in {where}, got nothing")
    return token


@app.command(cls=OneLineCommand)
def main(
    detector: Annotated[
        str, typer.Option(help="Hub id or folder of a GroundingDINO.")
    ] = "IDEA-Research/grounding-dino-tiny",
    features: Annotated[
        str, typer.Option(help="Hub id or folder of a DINOv3 ViT.")
    ] = "facebook/dinov3-vitb16-pretrain-lvd1689m",
    tokens: Annotated[
        Tokens, typer.Option(help="compat: rules of EdiVal-Bench's scorer, to compare with it.")
    ] = Tokens.strict,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Minimum score of a box.")] = 0.35,
    device: Annotated[str, typer.Option(help="Device of the models.")] = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 8200,
    token_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help=f"File with a bearer token that requests must carry; or set {TOKEN_VARIABLE}.",
        ),
    ] = None,
    max_body: Annotated[
        int, typer.Option(min=1, help="Maximum bytes of a request.")
    ] = DEFAULT_LIMITS.max_body,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum pixels of an image.")
    ] = DEFAULT_LIMITS.max_pixels,
    max_total_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum pixels of all images of a request.")
    ] = DEFAULT_LIMITS.max_total_pixels,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Maximum number of requests at once; more get 503.")
    ] = DEFAULT_LIMITS.max_requests,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Maximum number of chains in one batch.")
    ] = DEFAULT_LIMITS.max_batch,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Longest wait for further chains of a batch, s.")
    ] = DEFAULT_LIMITS.max_wait,
    grace: Annotated[
        float, typer.Option(min=0, help="Longest time to finish requests after a signal, s.")
    ] = 30.0,
    access_log: Annotated[bool, typer.Option(help="Log every request.")] = False,
) -> None:
    """Serve content consistency over HTTP until SIGTERM or Ctrl-C."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with refusing():
        with naming_argument("--token-file", UnicodeDecodeError):
            token = read_token(token_file)
        for name, source in (("detector", detector), ("features", features)):
            check_source(name, source, "config.json")
        check_device("device", device)
        application = create_app(
            partial(load, detector, features, tokens, threshold, device),
            limits=Limits(
                max_body=max_body,
                max_pixels=max_pixels,
                max_total_pixels=max_total_pixels,
                max_requests=max_requests,
                max_batch=max_batch,
                max_wait=max_wait,
            ),
            token=token,
        )
        server = partial(serve, application, host=host, port=port, grace=grace)
        status = server(access_log=access_log)
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
