"""What a backend does in one operation against the same in float64 NumPy."""

import backends
import keras
import numpy as np
import pytest

from keras_pdattn.ops import dtypes, native, statistics, sums

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def tensors(*arrays):
    return [keras.ops.convert_to_tensor(x) for x in arrays]


@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(has_bias):
    x, kernel, bias = normal(2, 3, 4), normal(4, 5, 6), normal(5, 6) if has_bias else None
    heads, out, out_bias = normal(2, 3, 5, 6), normal(5, 6, 7), normal(7) if has_bias else None

    def projections(x, heads, kernel, out):
        return native.linear(x, kernel, bias), native.linear(heads, out, out_bias, 2)

    if has_bias:
        bias, out_bias = tensors(bias, out_bias)
    found = projections(*tensors(x, heads, kernel, out))
    expected = (
        np.einsum("btc,chd->bthd", x, kernel, dtype="float64"),
        np.einsum("bthd,hdc->btc", heads, out, dtype="float64"),
    )
    for y, z, b in zip(found, expected, (bias, out_bias)):
        z = z if b is None else z + backends.to_numpy(b)
        np.testing.assert_allclose(backends.to_numpy(y), z, atol=1e-5)


def test_split():
    x = normal(2, 3, 7, 4)
    parts = native.split(*tensors(x), [2, 4, 1], axis=2)
    for part, expected in zip(parts, np.split(x, [2, 6], axis=2), strict=True):
        np.testing.assert_array_equal(backends.to_numpy(part), expected)


#: Far below zero, where `elu(x) + 1` would round to nothing; at zero; where `exp` is infinite.
POINTS = np.array([-80.0, -30.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 100.0], "float32")


def test_features_of_linear_attention():
    """Values to float32's relative precision, and slopes, that at zero being one."""
    exact = POINTS.astype("float64")
    expected = np.where(exact > 0, exact + 1, np.exp(np.minimum(exact, 0)))
    found = backends.to_numpy(native.exp_below_zero(*tensors(POINTS)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    (slopes,) = backends.gradients(lambda x: keras.ops.sum(native.exp_below_zero(x)), [POINTS])
    np.testing.assert_allclose(slopes, np.minimum(expected, 1.0), rtol=1e-5)


@pytest.mark.skipif(backends.BACKEND != "torch", reason="the gradient is the backend's own")
def test_slopes_have_slopes():
    """Torch's gradient of ours can be differentiated, as those of other backends."""
    import torch

    x = torch.tensor(POINTS, requires_grad=True)
    (slope,) = torch.autograd.grad(native.exp_below_zero(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    below = POINTS < 0
    np.testing.assert_allclose(curvature[below].numpy(), np.exp(POINTS[below]), rtol=1e-5)
    np.testing.assert_array_equal(curvature[POINTS > 0].numpy(), 0)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("axis", [1, 2])
def test_running_sums(length, axis):
    """At lengths where runs begin, and end ragged."""
    x = normal(2, length, 3) if axis == 1 else normal(2, 3, length)
    found = backends.to_numpy(sums.cumulative_sum(*tensors(x), axis=axis))
    np.testing.assert_allclose(found, np.cumsum(x, axis, dtype="float64"), atol=1e-4)


def test_running_sums_of_ones_count():
    found = backends.to_numpy(sums.cumulative_sum(keras.ops.ones((1, 5000, 1)), axis=1))
    np.testing.assert_array_equal(found[0, :, 0], np.arange(1, 5001))


def test_cast():
    x = keras.ops.ones((2,), dtype="float32")
    assert dtypes.cast(x, "float32") is x
    assert keras.backend.standardize_dtype(dtypes.cast(x, "bfloat16").dtype) == "bfloat16"


@pytest.mark.skipif(backends.BACKEND != "torch", reason="the gradient is the backend's own")
@pytest.mark.parametrize("length", [1, 5, 16, 17, 300])
@pytest.mark.parametrize("is_padded", [False, True])
def test_moments_of_prefixes(monkeypatch, length, is_padded):
    """Torch's own way against that of other backends: values, gradients and theirs."""
    import torch

    x = torch.tensor(normal(2, length, 3, 4), dtype=torch.float64, requires_grad=True)
    mask = RNG.random((2, length)) < 0.7 if is_padded else None
    factors = [torch.tensor(normal(*x.shape), dtype=torch.float64) for _ in range(2)]

    def moments(x):
        return statistics.prefix_moments(x, None, mask)[1:]

    def values_and_gradients():
        found = moments(x)
        loss = sum((one * factor).sum() for one, factor in zip(found, factors))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad((gradient * factors[0]).sum(), x)
        return [y.detach().numpy() for y in (*found, gradient, second)]

    ours = values_and_gradients()
    monkeypatch.setattr(native, "is_eager_torch", lambda: False)
    for one, other in zip(ours, values_and_gradients(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
