"""What the random cases of every op share: what they draw from, and the error they may have."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# fp32 results differ from PyTorch's by the order of their sums, which at tiny sizes is all the
# error there is.
SLACK = {torch.float32: 8.0, torch.float16: 2.0, torch.bfloat16: 2.0}

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(["dense", "rows", "gaps"])


def wide(tensor):
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
