"""How much the heads of an attention layer repeat each other."""

import dataclasses
import itertools

import numpy as np

from keras_pdattn.analysis import arrays


@dataclasses.dataclass(frozen=True, eq=False)
class HeadRedundancy:
    """How alike the heads of a layer attend; see `head_redundancy`.

    Attributes:
        distance: mean of `distances` over pairs of different heads.
        cosine_similarity: mean of `cosine_similarities` over them.
        cka: mean of `ckas` over them.
        distances: array `(heads, heads)`, zero on the diagonal.
        cosine_similarities: array `(heads, heads)`, one on the diagonal.
        ckas: array `(heads, heads)`, one on the diagonal.
    """

    distance: float
    cosine_similarity: float
    cka: float
    distances: np.ndarray = dataclasses.field(repr=False)
    cosine_similarities: np.ndarray = dataclasses.field(repr=False)
    ckas: np.ndarray = dataclasses.field(repr=False)


def head_redundancy(scores, mask=None):
    r"""Measures how much the heads of an attention layer repeat each other.

    Let \(a_{hi}\) be the row of scores of head \(h\) and query \(i\), over \(M\)
    queries of all sequences. For each pair of heads

    \[ \text{distance}(h, g) = \frac{1}{M} \sum_i \lVert a_{hi} - a_{gi} \rVert, \qquad
       \text{cosine}(h, g) = \frac{1}{M} \sum_i
       \frac{a_{hi}^\top a_{gi}}{\lVert a_{hi} \rVert \lVert a_{gi} \rVert} \]

    and, with the rows of one sequence as a matrix \(X_h\) of queries times keys
    whose columns are centred, linear centred kernel alignment

    \[ \text{CKA}(h, g) = \frac{\lVert X_g^\top X_h \rVert_F^2}
       {\lVert X_h^\top X_h \rVert_F \lVert X_g^\top X_g \rVert_F}, \]

    averaged over the sequences with two queries or more (not a number if there
    are none). Heads that repeat each other have a small distance, and a cosine
    and a CKA near 1. A quotient whose denominator is zero counts as 0: the
    cosine where a head sees nothing, the CKA of a head that attends alike from
    everywhere. A head with itself has the distance 0, cosine and CKA 1.

    Masking: queries that `mask` calls padding are left out, and those for which
    no head sees anything. Padded keys have scores of zero, and change nothing.

    Cost: heads times queries squared times keys products per sequence, in
    float64; memory for one and a half times the scores of one sequence.

    Args:
        scores: array or tensor of shape `(batch, heads, queries, keys)`, such as
            `attention_scores` returns; or with as many axes of queries as of
            keys, `(batch, heads, *grid, *grid)`.
        mask: boolean `(batch, queries)`, or `(batch, *grid)`, False for padding.

    Returns:
        A `HeadRedundancy`, with the matrices `distances`, `cosine_similarities`
        and `ckas` of shape `(heads, heads)`, and their means over pairs of
        different heads, `distance`, `cosine_similarity` and `cka`.

    Raises:
        ValueError: if there are fewer than two heads; if shapes don't fit; if
            `scores` are not finite; if `mask` is an additive float mask, or leaves
            no query that sees anything.

    Example:

    ```python
    import numpy as np
    from keras_pdattn import analysis, layers

    x = np.random.default_rng(0).normal(size=(2, 10, 32)).astype("float32")
    attention = layers.BatchNormAttention(num_heads=4, key_dim=8)
    _, scores = attention(x, x, return_attention_scores=True)
    redundancy = analysis.head_redundancy(scores)
    redundancy.distances.shape  # (4, 4)
    0 < redundancy.distance < 2**0.5  # True
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781); CKA: Kornblith et al.,
        "Similarity of Neural Network Representations Revisited", ICML 2019
        (arXiv:1905.00414).
    """
    scores, queries_shape, _ = arrays.as_scores(scores)
    mask = arrays.as_mask("mask", mask, queries_shape)
    heads = scores.shape[1]
    if heads < 2:
        raise ValueError(
            "Redundancy is a matter of pairs, and needs at least two heads. "
            f"Received: scores of shape {scores.shape}"
        )
    totals = np.zeros((3, heads, heads))
    num_queries = num_sequences = 0
    for sequence, valid in zip(scores, mask):
        kept = valid & sequence.any(axis=(0, 2))
        totals += _compared(np.compress(kept, sequence, axis=1))
        num_queries += kept.sum()
        num_sequences += kept.sum() > 1
    if not num_queries:
        raise ValueError(
            "`mask` must leave a query that sees something. "
            f"Received: mask with {int(mask.sum())} queries left, none of which does"
        )
    if not np.isfinite(totals[0]).all():
        raise ValueError("`scores` must be finite. Received: scores with NaN or infinity")
    counts = np.array([num_queries, num_queries, num_sequences or np.nan]).reshape(3, 1, 1)
    matrices = totals / counts
    for matrix, with_itself in zip(matrices, (0.0, 1.0, 1.0)):
        np.fill_diagonal(matrix, with_itself)
    means = (float(matrix[np.triu_indices(heads, 1)].mean()) for matrix in matrices)
    return HeadRedundancy(*means, *matrices)


def _compared(rows):
    """Sums of distances and cosines over the queries of `(heads, queries, keys)`, and CKAs."""
    rows = rows.astype("float64", copy=False)
    has_cka = rows.shape[1] > 1
    distances, cosines = _distances_and_cosines(rows)
    return distances, cosines, _ckas(rows) if has_cka else np.zeros_like(distances)


def _distances_and_cosines(rows):
    """Sums over the queries of `(heads, queries, keys)`; the diagonals are left at zero."""
    heads = len(rows)
    totals = np.zeros((2, heads, heads))
    norms = np.sqrt(np.einsum("hts,hts->ht", rows, rows))
    for h, g in itertools.combinations(range(heads), 2):
        distances = np.linalg.norm(rows[h] - rows[g], axis=-1)
        cosines = _quotient(np.einsum("ts,ts->t", rows[h], rows[g]), norms[h] * norms[g])
        totals[:, h, g] = totals[:, g, h] = distances.sum(), cosines.sum()
    return totals


def _ckas(rows):
    """The CKA of each pair of `(heads, queries, keys)`, which are centred in place."""
    # From the first row on, columns without spread are exactly zero, not zero but for rounding.
    rows -= rows[:, :1].copy()
    rows -= rows.mean(axis=1, keepdims=True)
    # ||Y'X||^2 is the inner product of XX' and YY', which are made once for each head, in blocks
    # of rows that take a quarter of the room of the scores.
    heads, queries, keys = rows.shape
    products = np.zeros((heads, heads))
    step = max(1, keys // 4)
    for start in range(0, queries, step):
        grams = rows[:, start : start + step] @ rows.transpose(0, 2, 1)
        grams = grams.reshape(heads, -1)
        products += grams @ grams.T
    norms = np.sqrt(np.diagonal(products))
    return _quotient(products, np.outer(norms, norms))


def _quotient(numerator, denominator):
    """Elementwise, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
