"""Products whose number of rows is one of few, so that what oneDNN compiles and keeps for each number has an end."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from llm_parallel.model.deterministic import rows_computed


def in_few_sizes(multiply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The product with rows of zeros behind x; those of the result are cut off. On a GPU, x as it is."""

    def padded(x: Tensor) -> Tensor:
        rows = x.shape[0]
        missing = 0 if x.is_cuda else rows_computed(rows) - rows
        return multiply(F.pad(x, (0, 0, 0, missing)))[:rows] if missing else multiply(x)

    return padded
