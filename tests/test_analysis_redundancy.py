"""Redundancy of heads: its definitions, written as loops in float64."""

import tracemalloc

import keras
import numpy as np
import pytest

from keras_pdattn import analysis, layers

RNG = np.random.default_rng(0)


def softmax(*shape):
    scores = np.exp(2 * RNG.normal(size=shape))
    return scores / scores.sum(axis=-1, keepdims=True)


def by_loops(scores, mask=None):
    """Distance, cosine similarity and CKA of each pair, literally."""
    batch, heads, queries, _ = scores.shape
    matrices = np.zeros((3, heads, heads))
    for h, g in np.ndindex(heads, heads):
        distances, cosines, ckas = [], [], []
        for b in range(batch):
            kept = []
            for i in range(queries):
                if (mask is None or mask[b, i]) and np.abs(scores[b, :, i]).sum() > 0:
                    kept.append(i)
            for i in kept:
                x, y = scores[b, h, i], scores[b, g, i]
                distances.append(np.sqrt(((x - y) ** 2).sum()))
                norms = np.sqrt((x**2).sum()) * np.sqrt((y**2).sum())
                cosines.append((x * y).sum() / norms if norms else float(h == g))
            if len(kept) > 1:
                x, y = (a - a.mean(axis=0) for a in (scores[b, h, kept], scores[b, g, kept]))
                denominator = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
                is_zero = denominator < 1e-25
                cka = 0 if is_zero else np.linalg.norm(y.T @ x) ** 2 / denominator
                ckas.append(1 if h == g else cka)
        matrices[:, h, g] = np.mean(distances), np.mean(cosines), np.mean(ckas)
    return matrices


def assert_same(redundancy, expected, tolerance=1e-12):
    matrices = redundancy.distances, redundancy.cosine_similarities, redundancy.ckas
    np.testing.assert_allclose(matrices, expected, atol=tolerance)
    pairs = [
        np.mean([matrix[h, g] for h in range(len(matrix)) for g in range(len(matrix)) if h != g])
        for matrix in expected
    ]
    means = redundancy.distance, redundancy.cosine_similarity, redundancy.cka
    np.testing.assert_allclose(means, pairs, atol=tolerance)


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (2, 3, 9, 2), (2, 2, 3, 11)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_is_its_definition(shape, masked):
    """With rows of zeros: queries that see nothing, and one that nothing sees for one head."""
    scores = softmax(*shape)
    scores[0, :, 1] = 0
    scores[1, 0, 2] = 0
    mask = None
    if masked:
        mask = RNG.random((shape[0], shape[2])) < 0.7
        mask[0] = [True, False] + [True] * (shape[2] - 2)
        mask[1] = [False, False, True] + [False] * (shape[2] - 3)  # Too few for a CKA.
    before = scores.copy()
    assert_same(analysis.head_redundancy(scores, mask), by_loops(scores, mask))
    np.testing.assert_array_equal(scores, before)


def test_padding_changes_nothing():
    """Padded queries, whatever they hold, and padded keys, which have scores of zero."""
    scores = softmax(2, 3, 5, 4)
    padded = np.zeros((2, 3, 8, 7))
    padded[:, :, 2:7, 1:5] = scores
    padded[:, :, 0] = 1e6
    mask = np.zeros((2, 8), bool)
    mask[:, 2:] = True  # The last row is not masked, but sees nothing.
    alone = analysis.head_redundancy(scores)
    expected = alone.distances, alone.cosine_similarities, alone.ckas
    assert_same(analysis.head_redundancy(padded, mask), expected)


def test_identical_heads():
    scores = np.repeat(softmax(2, 1, 5, 5), 3, axis=1)
    redundancy = analysis.head_redundancy(scores)
    assert redundancy.distance == 0
    np.testing.assert_allclose(redundancy.cosine_similarity, 1)
    np.testing.assert_allclose(redundancy.cka, 1)


def test_heads_that_see_different_keys():
    scores = np.zeros((1, 2, 4, 8))
    scores[0, 0, range(4), range(4)] = 1
    scores[0, 1, range(4), range(4, 8)] = 1
    redundancy = analysis.head_redundancy(scores)
    np.testing.assert_allclose(redundancy.distance, np.sqrt(2))
    assert redundancy.cosine_similarity == 0
    # A linear map takes one to the other.
    np.testing.assert_allclose(redundancy.cka, 1)


def test_a_head_that_attends_alike_from_everywhere_has_no_cka():
    """Its centred rows are zero, whatever rounding makes of the mean of sevenths."""
    scores = softmax(1, 3, 11, 7)
    scores[:, 1:] = 1 / 7
    redundancy = analysis.head_redundancy(scores)
    np.testing.assert_array_equal(redundancy.ckas, np.eye(3))


def test_one_query_has_no_cka():
    redundancy = analysis.head_redundancy(softmax(2, 2, 1, 4))
    assert np.isnan(redundancy.cka)
    np.testing.assert_array_equal(np.diagonal(redundancy.ckas), 1)
    assert redundancy.distance > 0


def test_several_axes_are_flattened():
    scores, mask = softmax(2, 3, 6, 4), RNG.random((2, 6)) < 0.7
    expected = by_loops(scores, mask)
    grid = scores.reshape(2, 3, 2, 3, 4, 1)
    assert_same(analysis.head_redundancy(grid, mask), expected)
    assert_same(analysis.head_redundancy(grid, mask.reshape(2, 2, 3)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors_of_any_precision(dtype):
    scores = keras.ops.cast(softmax(2, 3, 5, 5).astype("float32"), dtype)
    exact = keras.ops.convert_to_numpy(keras.ops.cast(scores, "float32")).astype("float64")
    mask = np.ones((2, 5))
    mask[1, 4] = 0
    redundancy = analysis.head_redundancy(scores, keras.ops.convert_to_tensor(mask))
    assert_same(redundancy, by_loops(exact, mask))
    assert redundancy.distances.dtype == "float64" and isinstance(redundancy.distance, float)


def test_of_a_layer():
    x = RNG.normal(size=(2, 6, 8)).astype("float32")
    _, scores = layers.BatchNormAttention(3, 4)(x, x, return_attention_scores=True)
    redundancy = analysis.head_redundancy(scores)
    expected = by_loops(keras.ops.convert_to_numpy(scores).astype("float64"))
    assert_same(redundancy, expected, 1e-6)
    assert repr(redundancy).startswith("HeadRedundancy(distance=")
    assert "array" not in repr(redundancy)
    with pytest.raises(AttributeError):
        redundancy.distance = 0.0


@pytest.mark.parametrize("shape", [(2, 8, 512, 512), (2, 8, 2048, 16)], ids=str)
def test_memory_is_that_of_one_sequence(shape):
    scores = RNG.random(shape, dtype="float32")
    one_sequence = scores[0].size * 8
    tracemalloc.start()
    analysis.head_redundancy(scores)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * one_sequence


@pytest.mark.parametrize(
    ("scores", "mask", "message"),
    [
        (np.ones((2, 1, 3, 3)), None, r"two heads. Received: scores of shape \(2, 1, 3, 3\)"),
        (np.ones((2, 3)), None, r"`scores` must have the shape.*\(2, 3\)"),
        (np.ones((2, 3, 4)), None, r"Received: scores of shape \(2, 3, 4\)"),
        (np.ones((2, 3, 4, 4, 4)), None, "as many axes of queries as of keys"),
        (np.ones((0, 3, 4, 4)), None, "none of them empty"),
        (np.ones((2, 3, 4, 4), int), None, "`scores` must be floating point.*int64"),
        (np.full((2, 3, 4, 4), np.nan), None, "`scores` must be finite. Received: scores with"),
        (None, None, "`scores` must be a tensor of numbers. Received: scores=None"),
        (np.ones((2, 3, 4, 4)), np.ones((2, 3)), r"`mask`.*\(2, 4\).*shape \(2, 3\)"),
        (np.ones((2, 3, 4, 4)), np.full((2, 4), -1e9), "`mask`.*additive.*Received: mask"),
        (np.ones((2, 3, 4, 4)), np.zeros((2, 4), bool), "Received: mask with 0 queries left"),
        (np.zeros((2, 3, 4, 4)), None, "Received: mask with 8 queries left, none of which"),
    ],
)
def test_errors(scores, mask, message):
    with pytest.raises(ValueError, match=message):
        analysis.head_redundancy(scores, mask)
