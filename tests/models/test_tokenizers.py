"""What the tokenizers do otherwise on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from models.var_tokenizer import bicubic_taps, resize_lines
from models.zoo import TOKENIZERS, ZOO

SIDES = [
    (side, tokenizer.patch_nums[-1])
    for tokenizer in (TOKENIZERS[ZOO[name].tokenizer].config for name in ("var-d16", "var-d36", "var-mini"))
    for side in tokenizer.patch_nums[:-1]
]


@pytest.mark.parametrize("source, target", SIDES)
def test_resizing_without_the_kernel(source, target):
    """As ``F.interpolate`` resizes, of all published levels."""
    x = torch.randn(2, 3, source, source, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x.double(), (target, target), mode="bicubic")
    line = bicubic_taps(source, target)
    found = resize_lines(resize_lines(x, *line).mT, *line).mT
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
