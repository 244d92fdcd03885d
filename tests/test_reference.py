"""The oracle itself, against numbers worked out by hand."""

import numpy as np
import reference


def column(*numbers):
    """A sequence of one head and one feature."""
    return np.array(numbers, "float64").reshape(1, -1, 1, 1)


def test_softmax():
    # exp(0) : exp(ln 3) = 1 : 3
    output, scores = reference.attention(column(1), column(0, np.log(3)), column(4, 8))
    np.testing.assert_allclose(scores[0, 0], [[0.25, 0.75]])
    np.testing.assert_allclose(output.ravel(), [7])


def test_scores_are_scaled_by_the_root_of_the_depth():
    query = np.full((1, 1, 1, 4), np.log(3))
    key = np.stack([np.zeros(4), np.full(4, 0.5)]).reshape(1, 2, 1, 4)
    _, scores = reference.attention(query, key, key)
    # 4 * ln 3 * 0.5 / sqrt 4 = ln 3
    np.testing.assert_allclose(scores[0, 0], [[0.25, 0.75]])


def test_batch_norm():
    # Mean 2 and deviation 1 make the keys -1 and 1, and the query 2 + ln 3 / 2.
    primal = reference.Primal(transforms=(reference.BatchNorm(epsilon=0.0),))
    query = column(2 + np.log(3) / 2)
    _, scores = reference.attention(query, column(1, 3), column(0, 1), primal)
    np.testing.assert_allclose(scores[0, 0], [[0.25, 0.75]])


def test_scaled_heads_average_windows_the_last_one_ragged():
    primal = reference.Primal(scales=(2,))
    output, scores = reference.attention(column(0), column(1, 2, 3), column(2, 4, 9), primal)
    np.testing.assert_allclose(scores[0, 0], [[0.25, 0.25, 0.5]])
    np.testing.assert_allclose(output.ravel(), [6])


def test_windows_start_at_the_first_valid_key():
    primal = reference.Primal(scales=(2,))
    key_mask = np.array([[False, True, True, False, True]])
    _, scores = reference.attention(
        column(0), column(9, 1, 2, 9, 3), column(9, 1, 2, 9, 3), primal, key_mask=key_mask
    )
    np.testing.assert_allclose(scores[0, 0], [[0, 0.25, 0.25, 0, 0.5]])


def test_causal_scaled_head_sees_its_own_window_so_far():
    primal = reference.Primal(scales=(2,))
    zeros = column(0, 0, 0, 0)
    _, scores = reference.attention(zeros, zeros, column(1, 2, 3, 4), primal, is_causal=True)
    np.testing.assert_allclose(
        scores[0, 0],
        [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0.25, 0.25, 0.25, 0.25]],
    )


def test_heads_are_grouped_in_order_and_evenly():
    assert reference.head_scales(8, (1, 2, 4, 8)) == [1, 1, 2, 2, 4, 4, 8, 8]
    assert reference.head_scales(6, (1, 2, 4, 8)) == [1, 1, 2, 2, 4, 8]
