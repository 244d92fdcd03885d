"""What a backend does in one operation against the same in float64 NumPy."""

import sys

import backends
import keras
import numpy as np
import pytest

from keras_pdattn import Primal, ops
from keras_pdattn.ops import dtypes, examples, indexing, native, states, statistics, sums
from keras_pdattn.training_sets import ScaledHeads, SlidingWindow
from keras_pdattn.transforms import BatchNorm

has_own_gradients = pytest.mark.skipif(
    backends.BACKEND != "torch", reason="the gradient is the backend's own"
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def tensors(*arrays):
    return [keras.ops.convert_to_tensor(x) for x in arrays]


def test_mapped_functions_run_as_they_are_written():
    """Rewritten by TensorFlow's autograph they would take several times as long."""
    ran = set()

    def square(entries):
        ran.add(sys._getframe().f_code)
        return keras.ops.square(entries[0])

    def squares(x):
        return native.map(square, (x,))

    ways = [squares]
    if backends.BACKEND == "tensorflow":
        import tensorflow as tf

        ways.append(tf.function(squares))
    for way in ways:
        (x,) = tensors(normal(3, 2))
        found = backends.to_numpy(way(x))
        np.testing.assert_allclose(found, np.square(backends.to_numpy(x)), rtol=1e-6)
    assert ran == {square.__code__}


@pytest.mark.skipif(backends.BACKEND != "torch", reason="others have a mask of their own")
def test_kernels_of_torch_get_no_row_of_infinity(monkeypatch):
    """Not all of them would give zero for it, in float16, where nothing less hides a key."""
    given, attend = [], native.torch_native.functional.scaled_dot_product_attention

    def record(*tensors, attn_mask, **options):
        given.append(backends.to_numpy(attn_mask))
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(native.torch_native.functional, "scaled_dot_product_attention", record)
    x, key_mask = (
        keras.ops.ones((2, 3, 1, 8), "float16"),
        np.array([[True, False, True], 3 * [False]]),
    )
    output = backends.to_numpy(ops.attention(x, x, x, "softmax", key_mask=key_mask))
    (mask,) = given
    np.testing.assert_array_equal(mask[:, 0, 0], [[0, -np.inf, 0], [0, 0, 0]])
    np.testing.assert_array_equal(output[:, 0, 0, 0], [1, 0])


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


@pytest.mark.parametrize("count, width, step", [(1, 1, 1), (3, 2, 4), (4, 10, 3), (2, 12, 4)])
def test_overlapping(count, width, step):
    """Stretches that leave gaps, that overlap, that end with a step."""
    x = normal(2, (count - 1 + -(-width // step)) * step, 3)
    found = indexing.overlapping(*tensors(x), 1, count, width, step)
    expected = np.stack([x[:, start : start + width] for start in np.arange(count) * step], axis=1)
    np.testing.assert_array_equal(backends.to_numpy(found), expected)
    compiled = backends.compiled(lambda x: indexing.overlapping(x, 1, count, width, step))
    np.testing.assert_array_equal(backends.to_numpy(compiled(*tensors(x))), expected)


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


@has_own_gradients
def test_slopes_have_slopes():
    """Torch's gradient of ours can be differentiated, and has a forward mode, as others."""
    import torch

    x = torch.tensor(POINTS, requires_grad=True)
    (slope,) = torch.autograd.grad(native.exp_below_zero(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    _, tangent = torch.func.jvp(native.exp_below_zero, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, slope)
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


def test_own_keys_change_where_others_do_not():
    """A cast that finds the keys in its dtype leaves nothing out."""
    x, narrow = keras.ops.ones((1, 2, 1, 3)), keras.ops.ones((1, 2, 1, 3), dtype="bfloat16")
    both = examples.Examples(x, x, own=examples.OwnExample(narrow, x))
    widened = both.with_keys(lambda key: dtypes.cast(key, "float32"))
    assert widened.key is x
    assert keras.backend.standardize_dtype(widened.own.key.dtype) == "float32"
    assert widened.with_keys(lambda key: dtypes.cast(key, "float32")) is widened


def check_against_other_backends(monkeypatch, function, *arrays):
    """Torch's own way against that of other backends: values, gradients, theirs and tangents."""
    import torch

    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]

    def weighted(tensors):
        """The sum of all entries, weighed anew each time the same."""
        rng = np.random.default_rng(1)
        return sum((x * torch.tensor(rng.normal(size=x.shape))).sum() for x in tensors)

    def values_and_gradients():
        found = function(*inputs)
        gradients = torch.autograd.grad(weighted(found), inputs, create_graph=True)
        second = torch.autograd.grad(weighted(gradients), inputs)
        _, tangents = torch.func.jvp(lambda *x: tuple(function(*x)), tuple(inputs), tuple(inputs))
        return [x.detach().numpy() for x in (*found, *gradients, *second, *tangents)]

    ours = values_and_gradients()
    with torch.no_grad():
        for one, other in zip(ours, function(*inputs)):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-12)
    monkeypatch.setattr(native, "is_eager_torch", lambda: False)
    for one, other in zip(ours, values_and_gradients(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@has_own_gradients
@pytest.mark.parametrize("length", [1, 5, 16, 17, 300])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("least_entries", [100, 10**6])
def test_moments_of_prefixes(monkeypatch, length, is_padded, least_entries):
    """By running sums of many entries, in runs of runs, and of few."""
    monkeypatch.setattr("keras_pdattn.ops.torch_native.LEAST_ENTRIES", least_entries)
    mask = RNG.random((2, length)) < 0.7 if is_padded else None

    def moments(x):
        return statistics.prefix_moments(x, None, mask)[1:]

    check_against_other_backends(monkeypatch, moments, normal(2, length, 3, 4))


@has_own_gradients
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("scale", [1, 3])
def test_causal_sums(monkeypatch, length, scale):
    """Chunks that begin and end ragged; of windows, three queries to each."""
    primal = Primal("relu", training_set=ScaledHeads((scale,)))
    monkeypatch.setattr(states, "is_cheaper", lambda *sizes: True)

    def attend(query, key, value):
        return [ops.attention(query, key, value, primal, is_causal=True)]

    inputs = [normal(2, length, 3, depth) for depth in (4, 4, 5)]
    check_against_other_backends(monkeypatch, attend, 1 + inputs[0] ** 2, *inputs[1:])


@has_own_gradients
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("num_axes", [1, 2])
def test_bands(monkeypatch, dilation, num_axes):
    """Slabs of keys, the last ragged, along one axis and two."""
    window = SlidingWindow(5, dilation, global_tokens=1)
    grid = (50,) * num_axes

    def attend(query, key, value):
        primal = Primal("relu", training_set=window)
        return [ops.attention(query, key, value, primal, query_grid=grid, key_grid=grid)]

    inputs = [normal(2, 50**num_axes, 1, 2) for _ in range(3)]
    check_against_other_backends(monkeypatch, attend, 1 + inputs[0] ** 2, *inputs[1:])


BANDS = Primal("elu", training_set=SlidingWindow(5))


@has_own_gradients
@pytest.mark.parametrize(
    "primal", ["linear", Primal(transform=BatchNorm(center=False)), BANDS], ids=str
)
def test_causal_calls_in_transforms_of_functions(primal):
    """Gradients of a `vmap`, a `vmap` of gradients, Jacobians and autocast, on torch."""
    import torch

    inputs = [torch.tensor(normal(2, 1, 70, 2, 4)) for _ in range(3)]

    def attend(query, key, value):
        return ops.attention(query, key, value, primal, is_causal=True)

    def loss(*tensors):
        return attend(*tensors).square().sum()

    def loss_of_all(*tensors):
        return torch.func.vmap(attend)(*tensors).square().sum()

    arguments = tuple(range(3))
    per_sample = torch.func.vmap(torch.func.grad(loss, arguments))(*inputs)
    of_all = torch.func.grad(loss_of_all, arguments)(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    sum(loss(*(x[i] for x in leaves)) for i in range(2)).backward()
    for one, other, leaf in zip(per_sample, of_all, leaves):
        torch.testing.assert_close(one, leaf.grad)
        torch.testing.assert_close(other, leaf.grad)
    (jacobian,) = torch.func.jacrev(lambda x: (attend(x, *(y[0] for y in inputs[1:]))[0, -1, 0],))(
        inputs[0][0]
    )
    assert jacobian.shape == (4, *inputs[0][0].shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(*(x[0] for x in leaves))
        rounded.backward()
    torch.testing.assert_close(rounded, loss(*(x[0] for x in inputs)), rtol=0.05, atol=0.5)


@has_own_gradients
def test_only_gradients_that_are_wanted(monkeypatch):
    """And none where nothing depends on the output."""
    import torch

    monkeypatch.setattr("keras_pdattn.ops.torch_native.LEAST_ENTRIES", 0)
    arrays = [normal(1, 70, 2, 4) for _ in range(3)]
    for index in range(3):
        tensors = [torch.tensor(x) for x in arrays]
        tensors[index].requires_grad_()
        ops.attention(*tensors, "linear", is_causal=True).square().sum().backward()
        everything = [torch.tensor(x, requires_grad=True) for x in arrays]
        ops.attention(*everything, "linear", is_causal=True).square().sum().backward()
        torch.testing.assert_close(tensors[index].grad, everything[index].grad)
    total = torch.ones(1, 70, 2, 1)
    part = torch.ones(1, 70, 2, 4, requires_grad=True)
    (native.ratio(part, total) * 0).sum().backward()
    assert total.grad is None


@has_own_gradients
def test_sum_of_products(monkeypatch):
    """Of keys laid out as they are not indexed; in transforms of functions; under autocast."""
    import torch

    def sums(key, value):
        return [native.sum_of_products(key.transpose(1, 2), value)]

    def loss(key, value):
        return sums(key, value)[0].square().sum()

    arrays = normal(2, 3, 70, 4), normal(2, 70, 6)
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(*inputs)
    for one, other in zip(torch.autograd.grad(rounded, inputs), expected):
        torch.testing.assert_close(one, other)
    per_sample = torch.func.vmap(torch.func.grad(loss, (0, 1)))
    for one, other in zip(per_sample(*(x.unsqueeze(1) for x in inputs)), expected):
        torch.testing.assert_close(one.squeeze(1), other)
    check_against_other_backends(monkeypatch, sums, *arrays)


@has_own_gradients
@pytest.mark.parametrize("total_shape", [(2, 3, 5, 1), (3, 1, 1)])
@pytest.mark.parametrize("less_shapes", [(), [(2, 1, 5, 4)], [(3, 1, 4), (2, 3, 5, 1)]])
def test_ratio(monkeypatch, total_shape, less_shapes):
    """Of tensors laid out as they are not indexed, others being broadcast to them."""
    monkeypatch.setattr("keras_pdattn.ops.torch_native.LEAST_ENTRIES", 0)

    def ratio(part, total, *less):
        return [native.ratio(part.transpose(1, 3), total.exp(), *less)]

    shapes = (2, 4, 5, 3), total_shape, *less_shapes
    check_against_other_backends(monkeypatch, ratio, *(normal(*shape) for shape in shapes))


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (1, 5, 1, 1), (2, 5, 3, 1), (2, 5, 3, 4)])
def test_weighted_sum(shape):
    x, weight, cotangent = normal(2, 5, 3, 4), normal(*shape), normal(2, 1, 3, 4)

    def total(x):
        return native.weighted_sum(x, *tensors(weight))

    output, (of_x,) = backends.output_and_gradients(total, [x], cotangent)
    np.testing.assert_allclose(output, (x * weight).sum(axis=1, keepdims=True), 1e-5, 1e-6)
    np.testing.assert_allclose(of_x, np.broadcast_to(cotangent * weight, x.shape), rtol=1e-5)


@pytest.mark.parametrize(
    "total_shape", [(2, 3, 5, 1), (2, 1, 5, 4), (1, 1, 1, 1), (2, 3, 5, 4), (3, 1, 1), (1, 4)]
)
def test_gradients_of_ratio(total_shape):
    part, total, cotangent = normal(2, 3, 5, 4), np.exp(normal(*total_shape)), normal(2, 3, 5, 4)
    output, found = backends.output_and_gradients(native.ratio, [part, total], cotangent)
    np.testing.assert_allclose(output, part / total, rtol=1e-6)
    of_part = cotangent / total
    missing = tuple(range(part.ndim - total.ndim))
    ones = tuple(axis for axis, size in enumerate(total_shape) if size == 1)
    of_total = (-of_part * part / total).sum(axis=missing).sum(axis=ones, keepdims=True)
    for one, expected in zip(found, (of_part, of_total)):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


@has_own_gradients
@pytest.mark.parametrize("batched", [(0, 0, 0, 0), (0, None, None, None), (None, None, 1, 0)])
def test_batches_of_ratios(monkeypatch, batched):
    """Of some of the tensors, which need not be those worked on in place."""
    import torch

    monkeypatch.setattr("keras_pdattn.ops.torch_native.LEAST_ENTRIES", 0)
    shapes = (2, 3, 5, 4), (3, 5, 1), (2, 1, 5, 4), (5, 4)
    inputs = []
    for dim, shape in zip(batched, shapes):
        shape = shape if dim is None else (*shape[:dim], 6, *shape[dim:])
        inputs.append(torch.tensor(normal(*shape)))

    def gradients(*tensors):
        return torch.func.grad(lambda *x: native.ratio(*x).square().sum(), (0, 1, 2, 3))(*tensors)

    found = torch.func.vmap(gradients, batched)(*inputs)
    for index in range(6):
        its = [x if dim is None else x.select(dim, index) for x, dim in zip(inputs, batched)]
        for one, other in zip(found, gradients(*its)):
            torch.testing.assert_close(one[index], other, rtol=1e-4, atol=1e-4)


@has_own_gradients
def test_batches_of_tangents():
    """Of one of the tensors only."""
    import torch

    inputs = tuple(torch.tensor(normal(1, 70, 2, 4)) for _ in range(3))

    def derivative(tangent):
        tangents = inputs[0], tangent, inputs[2]
        return torch.func.jvp(
            lambda *x: ops.attention(*x, "linear", is_causal=True), inputs, tangents
        )

    tangents = torch.tensor(normal(3, 1, 70, 2, 4))
    _, found = torch.func.vmap(derivative)(tangents)
    for one, tangent in zip(found, tangents):
        torch.testing.assert_close(one, derivative(tangent)[1])
