"""The dtypes that a workload can name, and what they mean for float32 products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# tf32: float32 tensors whose products may be rounded to TensorFloat-32, the default of the authors' code on a GPU.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Within it, products and convolutions of float32 are exact, or rounded to TensorFloat-32 if ``dtype`` is tf32."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
