"""The dtypes of exported weights; ``auto``: as in the checkpoint."""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
