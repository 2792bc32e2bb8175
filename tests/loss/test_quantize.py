"""Quantisers: against a brute-force nearest fp8 number, and what they must refuse or leave out."""

from __future__ import annotations

import pytest
import torch

from treepo_mega.loss.quantize import BLOCK, FORMATS, RECIPES, QuantizeError, quantize


def every_number(format: str) -> torch.Tensor:
    """All finite numbers of an fp8 format, sorted."""
    values = torch.arange(256, dtype=torch.uint8).view(FORMATS[format]).float()
    return values[values.isfinite()].unique()


def nearest(x: torch.Tensor, format: str) -> torch.Tensor:
    """Distance of each x to the nearest number of the format, by brute force."""
    return (x[..., None] - every_number(format)).abs().amin(-1)


def sample(rows: int = 150, columns: int = 200) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-3, 3, rows)[:, None]


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize(
    "recipe, block_rows", [("tensorwise", 1), ("rowwise", 1), ("blockwise", 1), ("blockwise", BLOCK)]
)
def test_every_value_becomes_the_nearest_number_at_its_scale(recipe, block_rows, power_of_2, format):
    x = sample()
    q = quantize(x, recipe, format=format, block_rows=block_rows, power_of_2_scales=power_of_2)
    scale = q.values() / q.data.float()
    at = x / scale.nan_to_num(1.0)
    largest = torch.finfo(FORMATS[format]).max
    assert float(at.abs().nan_to_num(0).max()) <= largest * (1 + 1e-6), "current scaling never saturates"
    error = (q.data.float() - at).abs()
    known = scale.isfinite()
    torch.testing.assert_close(error[known], nearest(at[known], format), rtol=1e-3, atol=largest * 1e-6)
    if power_of_2:
        assert (torch.frexp(q.scale)[0] == 0.5).all()
    else:
        reached = q.data.float().abs().amax()
        assert float(reached) == largest, "the largest magnitude uses the whole range"


def test_shapes_of_scales():
    x = sample(150, 200)
    assert quantize(x, "tensorwise").scale.shape == ()
    assert quantize(x, "rowwise").scale.shape == (150,)
    assert quantize(x, "blockwise").scale.shape == (150, 2)
    assert quantize(x, "blockwise", block_rows=BLOCK).scale.shape == (2, 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_slices_of_values_are_those_of_the_whole(recipe):
    q = quantize(sample(300, 200), recipe, block_rows=BLOCK)
    whole = q.values()
    for part in (slice(0, 300), slice(128, 200), slice(256, 300)):
        assert torch.equal(q.values(part), whole[part])


def test_a_slice_that_cuts_a_block_is_refused():
    with pytest.raises(ValueError, match="a multiple of 128"):
        quantize(sample(300), "blockwise", block_rows=BLOCK).values(slice(5, 10))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_with_its_place(recipe, bad):
    x = sample()
    x[7, 190] = bad
    with pytest.raises(QuantizeError, match="1 of 30000 values are NaN or infinite, the first at row 7, column 190"):
        quantize(x, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_padded_rows_neither_set_scales_nor_stop_anything(recipe):
    x = sample()
    alone = quantize(x[:100], recipe, block_rows=BLOCK)
    x[100:] = 1e30
    x[149] = float("nan")
    padded = quantize(x, recipe, block_rows=BLOCK, valid_rows=100)
    assert torch.equal(padded.values(slice(0, 100)), alone.values())
    assert padded.data.float().isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_and_nothing(recipe):
    assert (quantize(torch.zeros(5, 300), recipe).values() == 0).all()
    assert quantize(torch.zeros(0, 300), recipe).values().shape == (0, 300)
    tiny = quantize(torch.full((2, 4), 1e-45), recipe)
    assert tiny.scale.isfinite().all() and tiny.values().isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_input_is_its_fp32_value(recipe):
    x = sample().bfloat16()
    a, b = quantize(x, recipe), quantize(x.float(), recipe)
    assert torch.equal(a.data.float(), b.data.float()) and torch.equal(a.scale, b.scale)
