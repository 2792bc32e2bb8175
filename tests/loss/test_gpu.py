"""What only a GPU can show about the loss kernels. Skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch

from treepo_mega.loss import quantize, te
from treepo_mega.loss.backend import missing_for_kernels
from treepo_mega.loss.logprobs import logprob_entropy
from treepo_mega.loss.operands import Numerics
from treepo_mega.loss.shard import Shard

MISSING = missing_for_kernels()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"the kernels cannot run: {MISSING}")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("recipe", quantize.RECIPES)
def test_kernels_equal_tiles_of_torch(precision, recipe):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 576, generator=g).cuda().bfloat16().requires_grad_()
    weight = (torch.randn(5000, 576, generator=g) / 10).cuda().bfloat16().requires_grad_()
    target = torch.randint(0, 4990, (1000,), generator=g).cuda()
    got = []
    for backend in ("triton", "torch"):
        shard = Shard.of(weight, 0, 4990, numerics=Numerics(precision, recipe), backend=backend)
        logp, entropy = logprob_entropy(hidden, weight, target, shard)
        got.append((logp, entropy, *torch.autograd.grad((logp + 0.1 * entropy).sum(), (hidden, weight))))
    for a, b in zip(*got, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2


def test_transformer_engines_quantiser_is_ours():
    pytest.importorskip("transformer_engine.pytorch")
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    tex = pytest.importorskip("transformer_engine_torch")
    engine = te.transformer_engine("this test")
    quantizer = engine.Float8CurrentScalingQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3, device=x.device, rowwise=True, columnwise=False
    )
    made = quantizer(x)
    got = quantize.Quantized(made._data.view(torch.float8_e4m3fn), made._scale_inv.reshape(()), "tensorwise")
    want = quantize.quantize(x, "tensorwise")
    torch.testing.assert_close(got.scale, want.scale)
    assert float((got.values() - want.values()).norm() / want.values().norm()) < 1e-3


def test_transformer_engines_gradient_products():
    pytest.importorskip("transformer_engine.pytorch")
    dz, weight, hidden = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((50, 90), (90, 40), (50, 40)))
    d_hidden, d_weight = te.gradient_products(dz, weight, hidden)
    for a, b in ((d_hidden, dz.float() @ weight.float()), (d_weight, dz.float().t() @ hidden.float())):
        assert a.shape == b.shape and float((a - b).norm() / b.norm()) < 0.1
