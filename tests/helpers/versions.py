"""What older versions of torch lack."""

from __future__ import annotations

import pytest
import torch

tells_of_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell who has hooks on saved tensors, so that an activation's input and output are kept",
)
