"""Text recognition in images by rapidocr (PP-OCR), whose weights come with its package.

Needs the extra ``mteditflow[ocr]``.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

try:
    from rapidocr import RapidOCR
except ImportError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'mteditflow[ocr]'") from error


class RapidOcr:
    """Reader of the text in an image; a ``TextReader`` of EdiVal-Bench's checks.

    Lines are joined by a space in the order of the model, from top to bottom. Nothing is
    downloaded. An instance serves one call at a time.

    Args:
        threads: number of CPU threads; ``None`` uses all.

    Source: PP-OCR, as converted by rapidocr.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        count = -1 if threads is None else threads
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": count,
            }
        )

    def __call__(self, image: Image.Image) -> str:
        """Return the text of an image of any mode and size; "" if there is none."""
        pixels = np.asarray(image.convert("RGB"))
        # rapidocr expects BGR, as OpenCV reads images, in contiguous memory.
        lines = self._engine(np.ascontiguousarray(pixels[:, :, ::-1])).txts
        return " ".join(lines or ())
