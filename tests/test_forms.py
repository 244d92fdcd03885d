"""The fast forms against the plain ones, at lengths where blocks and chunks end.

States and chunks of finite feature maps (law 7), bands of sliding windows, blocks of
prefixes: each equals the form that `test_family.py` holds to the oracle.
"""

import backends
import keras
import numpy as np
import pytest
from members import RANDOM, few_where_compiled
from problems import assert_close

from keras_pdattn import Primal, feature_maps, ops
from keras_pdattn.ops import prefixes, states, windows
from keras_pdattn.training_sets import ScaledHeads, SlidingWindow

MAPS = {
    "elu": "elu",
    "relu": "relu",
    "taylor": "taylor",
    "random": RANDOM,
}


def arrays(query_length, key_length=None, heads=2, depth=4, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    lengths = query_length, key_length or query_length, key_length or query_length
    return [rng.normal(size=(batch, n, heads, depth)).astype("float32") for n in lengths]


def value_and_gradients(primal, inputs, **options):
    """The output, and gradients of its sum with random factors."""

    def attention(*tensors):
        return ops.attention(*tensors, primal, **options)

    shape = *inputs[0].shape[:3], inputs[2].shape[3]
    factors = np.random.default_rng(1).normal(size=shape)
    output, gradients = backends.output_and_gradients(attention, inputs, factors)
    return output, *gradients


def check_same(first, second, tolerance=1e-5):
    for one, other in zip(first, second):
        assert np.isfinite(one).all()
        assert_close(one, other, tolerance * max(1.0, np.abs(other).max()))


def in_form(monkeypatch, is_primal, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(states, "is_cheaper", lambda *sizes: is_primal)
        return value_and_gradients(*arguments, **options)


@few_where_compiled("length", [1, 2, 63, 64, 65, 127, 1000], few=[1, 65, 1000])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_primal_is_dual(monkeypatch, feature_map, length, is_causal):
    """Law 7: outputs and gradients, through states as through the N x N weights."""
    primal, inputs = Primal(MAPS[feature_map]), arrays(length)
    # Away from zero, a rectified normaliser is not ill-conditioned.
    inputs[:2] = [x + 1.0 for x in inputs[:2]]
    forms = [
        in_form(monkeypatch, is_primal, primal, inputs, is_causal=is_causal)
        for is_primal in (True, False)
    ]
    check_same(*forms)


@few_where_compiled("lengths", [(200, 200), (200, 130), (130, 200)], few=[(200, 130)])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("training_set", ["all_keys", ScaledHeads((3, 2))], ids=repr)
def test_primal_is_dual_with_padding(monkeypatch, feature_map, training_set, lengths):
    """Law 7 for causal states of pooled keys, cross-attention, and windows that start late."""
    primal = Primal(MAPS[feature_map], training_set=training_set)
    inputs = arrays(*lengths, batch=2)
    inputs[:2] = [x + 1.0 for x in inputs[:2]]
    key_mask = np.random.default_rng(2).random((2, lengths[1])) < 0.8
    key_mask[1, :70] = False
    forms = [
        in_form(monkeypatch, is_primal, primal, inputs, is_causal=True, key_mask=key_mask)
        for is_primal in (True, False)
    ]
    check_same(*forms)


@pytest.mark.parametrize(
    ("feature_map", "length", "is_causal", "is_primal"),
    [
        ("elu", 4, False, False),
        ("elu", 64, False, True),
        ("elu", 64, True, False),
        ("elu", 512, True, True),
        ("taylor", 16, False, False),
        ("taylor", 512, True, True),
    ],
)
def test_the_cheaper_form_is_taken(monkeypatch, feature_map, length, is_causal, is_primal):
    """A wide feature map on a short sequence takes the dual form, a long sequence the primal."""
    taken = []
    attend = states.primal_attention
    monkeypatch.setattr(
        states, "primal_attention", lambda *args: taken.append(True) or attend(*args)
    )
    inputs, primal = arrays(length), Primal(feature_map)
    ops.attention(*inputs, primal, is_causal=is_causal)
    assert bool(taken) == is_primal
    taken.clear()
    ops.attention(*inputs, primal, is_causal=is_causal, return_scores=True)
    assert not taken


def test_unknown_lengths_take_the_primal_form():
    assert states.is_cheaper(None, None, 9, 9, 9, is_causal=True)


def test_future_keys_out_of_range_change_nothing():
    """Random features of the past keep their scale, whatever the future's are."""
    query, key, value = arrays(200)
    key[:, :100] *= 40.0  # Exponents of -1,000: beyond float32 but for the scale kept apart.
    key[:, 100:] *= 0.1
    primal = Primal(RANDOM)
    full = backends.to_numpy(ops.attention(query, key, value, primal, is_causal=True))
    past = [x[:, :100] for x in (query, key, value)]
    prefix = backends.to_numpy(ops.attention(*past, primal, is_causal=True))
    assert np.abs(prefix).min(axis=(1, 3)).max() > 0
    assert_close(full[:, :100], prefix, 1e-4)


WINDOWS = [
    SlidingWindow(1),
    SlidingWindow(2),
    SlidingWindow(17),
    SlidingWindow(40),
    SlidingWindow(3, dilation=3),
    SlidingWindow(2, global_tokens=3),
    SlidingWindow(3, dilation=2, global_tokens=2),
]


def check_bands(primal, inputs, **options):
    """The banded output equals that of the dense form, which has scores."""

    def both(*inputs):
        dense, _ = ops.attention(*inputs, primal, return_scores=True, **options)
        return ops.attention(*inputs, primal, **options), dense

    output, dense = backends.jitted(both)(*inputs)
    assert_close(backends.to_numpy(output), backends.to_numpy(dense), 1e-5)
    return backends.to_numpy(output)


@few_where_compiled("window", WINDOWS, few=[WINDOWS[0], WINDOWS[3], WINDOWS[6]])
@few_where_compiled("lengths", [(129, 129), (64, 150), (150, 64)], few=[(64, 150)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_bands(window, lengths, is_causal):
    """Blocks of queries against slabs of keys, padding, cross-attention, global tokens."""
    inputs = arrays(*lengths, batch=2)
    key_mask = np.random.default_rng(2).random((2, lengths[1])) < 0.8
    key_mask[1, :5] = False
    for feature_map in ("softmax", RANDOM):
        primal = Primal(feature_map, training_set=window)
        check_bands(primal, inputs, is_causal=is_causal)
        check_bands(primal, inputs, is_causal=is_causal, key_mask=key_mask)


@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_bands_that_reach_beyond_the_next_block(is_causal):
    window = SlidingWindow(windows.MOST_BLOCK + 72)
    check_bands(Primal(training_set=window), arrays(900, heads=1), is_causal=is_causal)


@pytest.mark.parametrize("window", [WINDOWS[2], WINDOWS[4], WINDOWS[6]], ids=repr)
@pytest.mark.parametrize("size", [4, 20])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_windows_within_windows(monkeypatch, window, size, is_causal):
    """`sliding_window` on a layer that has one keeps the bands, and says what a mask would."""
    lengths = (150, 130)
    inputs, primal = arrays(*lengths, batch=2), Primal(training_set=window)
    query, key = (np.arange(length) for length in lengths)
    near = (np.abs(query[:, None] - key) < size)[None, None]
    options = {
        "is_causal": is_causal,
        "key_mask": np.random.default_rng(2).random((2, lengths[1])) < 0.8,
    }

    @backends.jitted
    def dense(*inputs):
        windowed = {"sliding_window": size, "return_scores": True, **options}
        return (
            ops.attention(*inputs, primal, **options),
            ops.attention(*inputs, primal, mask=near, **options),
            ops.attention(*inputs, primal, **windowed)[0],
        )

    @backends.jitted
    def banded(*inputs):
        return ops.attention(*inputs, primal, sliding_window=size, **options)

    plain, expected, scored = (backends.to_numpy(x) for x in dense(*inputs))
    assert np.abs(plain - expected).max() > 1e-3 or window.size * window.dilation <= size
    assert_close(scored, expected, 1e-5)
    monkeypatch.delattr(windows.Window, "visibility")
    assert_close(backends.to_numpy(banded(*inputs)), expected, 1e-5)


def test_windows_within_windows_over_a_grid():
    """A box within which even global tokens see and are seen."""
    grid = (15, 22)
    inputs = arrays(grid[0] * grid[1], heads=1, batch=2)
    rows, columns = np.unravel_index(np.arange(grid[0] * grid[1]), grid)
    near = np.ones((1, 1, 330, 330), bool)
    for at in (rows, columns):
        near &= np.abs(at[:, None] - at) < 5
    options = {"query_grid": grid, "key_grid": grid, "is_causal": True}
    primal = Primal(training_set=SlidingWindow(2, 2, 3))
    expected = backends.to_numpy(ops.attention(*inputs, primal, mask=near, **options))
    output = backends.to_numpy(ops.attention(*inputs, primal, sliding_window=5, **options))
    assert_close(output, expected, 1e-5)


@pytest.mark.parametrize(
    ("grid", "size", "has_bands"),
    [(None, 16, True), (None, 600, False), ((640, 4), 16, False), ((50, 52), 4, True)],
    ids=str,
)
def test_bands_are_taken_where_they_hold_fewer_pairs(monkeypatch, grid, size, has_bands):
    """On a narrow grid the slabs of boxes would reach far beyond its edges."""
    taken = []
    slabs = windows._Bands.slabs
    monkeypatch.setattr(windows._Bands, "slabs", lambda *args: taken.append(True) or slabs(*args))
    length = 1000 if grid is None else grid[0] * grid[1]
    inputs = arrays(length, heads=1)
    primal = Primal(training_set=SlidingWindow(size))
    ops.attention(*inputs, primal, query_grid=grid, key_grid=grid)
    assert bool(taken) == has_bands


@pytest.mark.parametrize("window", [WINDOWS[1], WINDOWS[6]], ids=repr)
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_bands_over_a_grid(window, is_causal):
    """A box on an image, its rows and columns ending within a block."""
    grid = (15, 22)
    inputs = arrays(grid[0] * grid[1], heads=1, batch=2)
    key_mask = np.random.default_rng(2).random((2, grid[0] * grid[1])) < 0.8
    primal = Primal(training_set=window)
    options = {"is_causal": is_causal, "query_grid": grid, "key_grid": grid}
    check_bands(primal, inputs, **options)
    check_bands(primal, inputs, key_mask=key_mask, **options)
    other = {**options, "query_grid": (22, 15)}
    check_bands(primal, inputs, **other)


@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
def test_gradients_of_bands(is_causal):
    """Through bands and through a dense mask that says the same."""
    inputs = arrays(70)
    position = np.arange(70)
    near = np.abs(position[:, None] - position) < 5
    banded = value_and_gradients(Primal(training_set=SlidingWindow(5)), inputs, is_causal=is_causal)
    masked = value_and_gradients(Primal(), inputs, mask=near[None, None], is_causal=is_causal)
    check_same(banded, masked)
    argument = value_and_gradients(Primal(), inputs, sliding_window=5, is_causal=is_causal)
    check_same(argument, banded, 1e-7)


def test_blocks_of_prefixes(monkeypatch):
    """Queries fitted on their own prefixes, block by block and all at once."""
    inputs = arrays(37, batch=2)
    mask = np.random.default_rng(2).random((2, 1, 37, 37)) < 0.9
    primal = Primal("elu", ["batch_norm", "conv1d"], ScaledHeads((2, 3)))
    options = {"is_causal": True, "mask": mask, "return_scores": True}
    by_block = [backends.to_numpy(x) for x in ops.attention(*inputs, primal, **options)]
    monkeypatch.setattr(prefixes, "BLOCK", 64)
    at_once = [backends.to_numpy(x) for x in ops.attention(*inputs, primal, **options)]
    check_same(by_block, at_once)


def test_random_features_approach_the_exp_kernel():
    """Their error falls as the root of their number."""
    inputs = arrays(64, depth=16)
    # Keys as long as unit variance makes them need many thousands of features.
    inputs[:2] = [0.5 * x for x in inputs[:2]]
    exact = backends.to_numpy(ops.attention(*inputs, "softmax"))
    errors = []
    for count in (64, 256, 1024):
        draws = [
            backends.to_numpy(
                ops.attention(*inputs, Primal(feature_maps.PositiveRandom(count, seed)))
            )
            for seed in range(4)
        ]
        errors.append(np.sqrt(np.mean(np.square(np.array(draws) - exact))))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[2] < 0.05


def test_random_features_are_orthogonal_gaussians():
    omega = feature_maps.PositiveRandom().draw(num_heads=64, depth=8, seed=0)
    assert omega.shape == (128, 64, 8)
    block = omega[:8, 0]
    off_diagonal = (block @ block.T)[~np.eye(8, dtype=bool)]
    assert_close(off_diagonal, 0, 1e-5)
    numbers = omega.ravel()
    assert abs(numbers.mean()) < 0.02 and abs(numbers.var() - 1) < 0.02
    assert abs((numbers**4).mean() / 3 - 1) < 0.05


def test_taylor_features_give_the_polynomial():
    x, y, _ = arrays(9, depth=5)
    taylor = feature_maps.Taylor()
    phi_x, phi_y = (
        backends.to_numpy(taylor.features(keras.ops.convert_to_tensor(z), {})) for z in (x, y)
    )
    assert phi_x.shape[-1] == 1 + 5 + 15
    z = np.einsum("bthd,bshd->bhts", x, y) / np.sqrt(5)
    kernel = np.einsum("bthf,bshf->bhts", phi_x, phi_y)
    assert_close(kernel, 1 + z + z**2 / 2, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_normaliser_of_long_sequences(feature_map, is_causal, dtype):
    """B5: equal keys share the weight evenly, over 8,192 of them, in 16 bits."""
    length = 8192
    x = keras.ops.ones((1, length, 1, 4), dtype=dtype)
    position = np.arange(length) + 1.0
    value = np.broadcast_to((position % 2)[None, :, None, None], (1, length, 1, 4))
    value = keras.ops.cast(keras.ops.convert_to_tensor(value.astype("float32")), dtype)
    output = ops.attention(x, x, value, Primal(MAPS[feature_map]), is_causal=is_causal)
    odd = np.ceil(position / 2) / position if is_causal else np.full(length, 0.5)
    assert_close(backends.to_numpy(output)[0, :, 0, 0], odd, 5e-3)
    if is_causal:
        last = keras.ops.cast(
            keras.ops.convert_to_tensor((position == length).astype("float32")), "float32"
        )
        last = keras.ops.reshape(last, (1, length, 1, 1))
        tail = ops.attention(x, x, last, Primal(MAPS[feature_map]), is_causal=True)
        assert_close(backends.to_numpy(tail)[0, -1, 0, 0] * length, 1.0, 5e-3)
