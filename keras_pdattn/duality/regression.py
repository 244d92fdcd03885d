"""Support vector regression whose expansion is attention, solved by scikit-learn."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_pdattn import primals, validation
from keras_pdattn.duality.problem import (
    NoRegressionError,
    Problem,
    log_divided,
    log_sum,
    to_float64,
    widest,
)
from keras_pdattn.layers.normalized_features import NormalizedFeatures
from keras_pdattn.layers.support_vector_attention import SupportVectorAttention
from keras_pdattn.ops import checks
from keras_pdattn.ops.dtypes import dtype_of, widen
from keras_pdattn.ops.examples import Examples, Queries
from keras_pdattn.primals import Primal


def fit(
    keys,
    values,
    primal="softmax",
    C="scale",
    epsilon=0.1,
    fit_intercept=True,
    weights=None,
    tolerance=1e-6,
):
    r"""Fits the support vector regression that a primal problem states for one head.

    For each output \(d\), with \(f(x) = W\,\Phi(T(x))/h(T(x)) + b\),

    \[ \min_{W, b, \xi, \tilde\xi} \tfrac12 \|W_d\|^2 + C \sum_{j \in S} (\xi_j + \tilde\xi_j)
       \quad\text{subject to}\quad |y_j - f_d(k_j)| \le \epsilon + \text{slack} \]

    by scikit-learn's `SVR` on the kernel
    \(K(x, y) = \kappa(T(x), T(y)) / (h(T(x))\,h(T(y)))\). The normaliser makes that
    kernel small, of the order of \(1/N^2\), and so \(C\) large: `"scale"` is what
    1 would be for a kernel of mean 1 on its diagonal.

    A `BatchNorm` takes its statistics from the keys, `ScaledHeads` fits the pooled
    keys to the pooled values, a convolution runs along the keys.

    Masking: none; leave padding out of `keys`. Causal use: none, since every query
    would have a regression of its own.

    Cost: \(M^2\) kernels of the \(M\) examples, and what the solver takes, between
    \(M^2\) and \(M^3\).

    Args:
        keys: array `(N, D)`, the training inputs.
        values: array `(N, outputs)` or `(N,)`, the targets.
        primal: a `Primal` for one head, its name or its config.
        C: positive float, the weight of errors and the bound on dual coefficients;
            or `"scale"`.
        epsilon: non-negative float, half the width of the tube in which errors
            are free.
        fit_intercept: whether there is a \(b\).
        weights: as in `ops.attention`, for one head; `None` for initial values.
        tolerance: positive float, where the solver stops.

    Returns:
        A `SupportVectorRegression`.

    Raises:
        ValueError: if an argument is out of its range, arrays don't fit each other,
            or `primal` is no regression: with a sliding window each query has a
            training set of its own.
        ImportError: if scikit-learn is not installed.

    Example:

    ```python
    import numpy as np
    from keras_pdattn import duality

    keys = np.linspace(-2, 2, 20).reshape(20, 1)
    regression = duality.fit(keys, np.sin(keys), "batch_norm", epsilon=0.05)
    layer = regression.to_layer()
    layer(np.zeros((1, 7, 1))).shape  # (1, 7, 1)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), equations 1 and 2.
    """
    primal = primals.get(primal)
    keys, values = _checked(keys, values)
    if C != "scale":
        C = validation.positive("C", C, "a positive number or 'scale'")
    epsilon = validation.real("epsilon", epsilon, "a number from 0", lambda x: 0 <= x < np.inf)
    validation.boolean("fit_intercept", fit_intercept)
    validation.positive("tolerance", tolerance)
    problem = _problem(primal, keys, values, weights)
    (examples,) = np.nonzero(problem.is_valid()[0])
    key = ops.take(problem.transformed_keys(), examples, axis=1)
    log_kernel = problem.log_kernel(key, key)[0, 0]
    log_normalizer = log_sum(log_kernel)
    log_kernel = log_divided(log_kernel, log_normalizer[:, np.newaxis])
    kernel = np.exp(log_divided(log_kernel, log_normalizer))
    size = np.mean(np.diag(kernel))
    if not 0 < size < np.inf:
        raise ValueError(
            "The normalised kernel of these keys with themselves is beyond floats, or zero. "
            "Smaller keys, or another feature map, may help. "
            f"Received: keys of size {np.abs(keys).max()}, feature_map={primal.feature_map!r}"
        )
    # Solvers want a kernel of the order of one: f is the same for s K, C / s and beta / s.
    scale = 1.0 / size
    C = scale if C == "scale" else C
    targets = to_float64(problem.examples.value)[0, examples, 0]
    regressors = [
        _solve(scale * kernel, target, C / scale, epsilon, fit_intercept, tolerance)
        for target in targets.T
    ]
    return SupportVectorRegression(
        primal=primal,
        keys=keys,
        targets=targets,
        C=C,
        epsilon=epsilon,
        fit_intercept=fit_intercept,
        regressors=regressors,
        problem=problem,
        examples=examples,
        kernel_of_examples=kernel,
        kernel_scale=scale,
        log_normalizer=log_normalizer,
    )


def _checked(keys, values):
    """Keys `(N, D)` and values `(N, outputs)` as float arrays."""
    for name, x in (("keys", keys), ("values", values)):
        dtype_of(name, x)
    received = f"keys.shape={np.shape(keys)}, values.shape={np.shape(values)}"
    keys, values = np.asarray(keys, "float64"), np.asarray(values, "float64")
    values = values.reshape(-1, 1) if values.ndim == 1 else values
    if keys.ndim != 2 or values.ndim != 2 or len(keys) != len(values) or 0 in keys.shape:
        raise ValueError(
            "`keys` must have the shape (N, depth) and `values` (N, outputs) or (N,), with at "
            f"least one of each. Received: {received}"
        )
    for name, array in (("keys", keys), ("values", values)):
        if not np.isfinite(array).all():
            raise ValueError(f"`{name}` must be finite. Received: {name}={array}")
    return keys, values


def _problem(primal, keys, values, weights):
    """The problem of one head that is fitted on `keys`."""
    primal.check_call(num_axes=1)
    if weights is None:
        weights = [member.initial_weights(1, keys.shape[1]) for member in primal.weighted_members]
    checks.check_weights(primal.weighted_members, weights)
    for member, its_weights in zip(primal.weighted_members, weights):
        expected, received = (
            {name: tuple(weight.shape) for name, weight in of_member.items()}
            for of_member in (member.initial_weights(1, keys.shape[1]), its_weights)
        )
        if received != expected:
            raise ValueError(
                f"`weights` of {type(member).__name__} must have the shapes {expected}. "
                f"Received: weights of shapes {received}"
            )
    ((heads, training_set),) = primal.training_set.groups(1)
    keys = Examples.keys(_as_head(keys), _as_head(values), len(keys))
    problem = Problem.of_heads(primal, training_set, heads, weights, keys)
    if problem.examples.window is not None or problem.examples.visible is not None:
        raise NoRegressionError(
            "Where queries see different keys, each has a training set of its own, and there is "
            f"no one regression to fit. Received: training_set={primal.training_set!r}"
        )
    return problem


def _as_head(x):
    """An array `(N, depth)` as a tensor `(1, N, 1, depth)`."""
    return widest(np.asarray(x)[np.newaxis, :, np.newaxis])


def _solve(kernel, target, C, epsilon, fit_intercept, tolerance):
    """One output's regression, by scikit-learn.

    Without an intercept, the examples are mirrored at zero: each has one beside it of
    the opposite features and target, which halves `C`, and by symmetry leaves no
    intercept.
    """
    try:
        from sklearn.svm import SVR
    except ImportError as error:
        raise ImportError(
            'Fitting needs scikit-learn: `pip install "keras-pdattn[svr]"`.'
        ) from error
    if not fit_intercept:
        kernel = np.block([[kernel, -kernel], [-kernel, kernel]])
        target, C = np.concatenate([target, -target]), C / 2
    return SVR(kernel="precomputed", C=C, epsilon=epsilon, tol=tolerance).fit(kernel, target)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SupportVectorRegression:
    r"""A solved regression, which is a head of attention; what `fit` returns.

    \[ f(x) = \sum_{j \in S} \beta_j\, K(x, k_j) + b
            = \sum_{j \in S} v_j \frac{\kappa(T(x), T(k_j))}{h(T(x))} + b, \qquad
       v_j = \frac{\beta_j}{h(T(k_j))}, \qquad \beta_j = \alpha_j - \tilde\alpha_j \]

    With `ScaledHeads` the \(M\) examples are the pooled keys, else the \(N\) keys.

    Attributes:
        primal: the `Primal`.
        keys: array `(N, D)`, the training inputs.
        targets: array `(M, outputs)`, what the examples are fitted to.
        C: the bound on dual coefficients.
        epsilon: half the width of the tube.
        fit_intercept: whether there is a \(b\).
        regressors: scikit-learn's `SVR` of each output, fitted on
            `kernel_scale * kernel_of_examples` (without an intercept, on the examples
            and their mirror images).
        problem: the keys and the weights.
        examples: indices of its examples; a training set of yours may mask some.
        kernel_of_examples: array `(M, M)`, \(K(k_i, k_j)\).
        kernel_scale: the factor on the kernel that the regressors were given.
        log_normalizer: array `(M,)`, \(\log h(T(k_j))\).

    Example:

    ```python
    import numpy as np
    from keras_pdattn import duality

    keys = np.linspace(-2, 2, 20).reshape(20, 1)
    regression = duality.fit(keys, np.sin(keys), "softmax", epsilon=0.05)
    regression.predict(keys).shape  # (20, 1)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781), equations 1 and 2.
    """

    primal: Primal
    keys: np.ndarray
    targets: np.ndarray
    C: float
    epsilon: float
    fit_intercept: bool
    regressors: list
    problem: Problem
    examples: np.ndarray
    kernel_of_examples: np.ndarray
    kernel_scale: float
    log_normalizer: np.ndarray

    def __repr__(self):
        return (
            f"{type(self).__name__}({self.primal!r}, examples={len(self.targets)}, "
            f"outputs={self.targets.shape[1]}, support_vectors={len(self.support)}, "
            f"C={self.C:.6g}, epsilon={self.epsilon:.6g})"
        )

    def kernel(self, queries):
        r"""The kernel of `queries`, `(T, D)`, and the examples: an array `(T, M)`.

        \[ s\,K(x, k_j) = s\,\frac{\kappa(T(x), T(k_j))}{h(T(x))\, h(T(k_j))} \]

        with \(s\) = `kernel_scale`, as the regressors take it. A convolution runs along
        the queries.

        Raises:
            ValueError: if `queries` have another shape, or are not finite.
        """
        queries = np.asarray(queries, "float64")
        depth = self.keys.shape[1]
        if queries.ndim != 2 or queries.shape[1] != depth or not np.isfinite(queries).all():
            raise ValueError(
                f"`queries` must be finite numbers of shape (T, {depth}). "
                f"Received: queries={queries} of shape {queries.shape}"
            )
        log_kernel = self.problem.log_kernel_of(Queries(_as_head(queries)))[0, 0][:, self.examples]
        log_kernel = log_divided(log_kernel, log_sum(log_kernel)[:, np.newaxis])
        return self.kernel_scale * np.exp(log_divided(log_kernel, self.log_normalizer))

    def predict(self, queries):
        """What scikit-learn predicts for `queries`, `(T, D)`: an array `(T, outputs)`.

        Raises:
            ValueError: if `queries` have another shape, or are not finite.
        """
        kernel = self.kernel(queries)
        if not len(kernel):
            return np.zeros((0, len(self.regressors)))
        if not self.fit_intercept:
            kernel = np.concatenate([kernel, -kernel], axis=1)
        outputs = np.stack([regressor.predict(kernel) for regressor in self.regressors], axis=1)
        return outputs if self.fit_intercept else outputs - self._solved_intercepts()

    @property
    def dual_coefficients(self):
        r"""\(\beta_j(d) = \alpha_j(d) - \tilde\alpha_j(d)\), `(M, outputs)`, from -C to C."""
        coefficients = np.zeros((len(self.regressors), len(self.targets)))
        for row, regressor in zip(coefficients, self.regressors):
            example = regressor.support_ % len(row)
            # The mirror image of an example counts for it with the opposite sign.
            sign = np.where(regressor.support_ < len(row), 1.0, -1.0)
            np.add.at(row, example, sign * regressor.dual_coef_[0])
        return self.kernel_scale * coefficients.T

    @property
    def intercept(self):
        """The bias b, `(outputs,)`."""
        intercepts = self._solved_intercepts()
        return intercepts if self.fit_intercept else np.zeros_like(intercepts)

    def _solved_intercepts(self):
        # That of a mirrored problem is what the solver's tolerance leaves of zero.
        return np.array([float(regressor.intercept_[0]) for regressor in self.regressors])

    @property
    def support(self):
        """Indices of the examples with a coefficient in any output, ascending."""
        return np.flatnonzero(np.any(self.dual_coefficients != 0, axis=1))

    @property
    def support_vectors(self):
        """The examples with a coefficient, `(len(support), D)`, before the transform."""
        return to_float64(self.problem.examples.key)[0, self.examples[self.support], 0]

    @property
    def values(self):
        r"""\(v_j\) of the keys, `(N, outputs)`: attention to them is the regression.

        A pooled key has the value of its window; one that no example takes in, zero.
        """
        # A key without any kernel, not with itself either, has nothing to say.
        inverse_normalizer = np.exp(log_divided(0.0, self.log_normalizer))
        values = np.zeros((1, self.problem.examples.key.shape[1], len(self.regressors)))
        values[0, self.examples] = self.dual_coefficients * inverse_normalizer[:, np.newaxis]
        return self.problem.by_key(values)[0]

    @property
    def primal_objective(self):
        r"""\(\tfrac12\|W_d\|^2 + C\sum_j(\xi_j(d) + \tilde\xi_j(d))\), `(outputs,)`."""
        fitted = self.kernel_of_examples @ self.dual_coefficients + self.intercept
        slack = np.maximum(np.abs(self.targets - fitted) - self.epsilon, 0.0)
        return 0.5 * self._squared_norm() + self.C * slack.sum(axis=0)

    @property
    def dual_objective(self):
        r"""\(\sum_j (\beta_j(d) y_j(d) - \epsilon|\beta_j(d)|) - \tfrac12\|W_d\|^2\), `(outputs,)`.

        Never above the primal objective, and equal to it at the solution.
        """
        coefficients = self.dual_coefficients
        gain = coefficients * self.targets - self.epsilon * np.abs(coefficients)
        return gain.sum(axis=0) - 0.5 * self._squared_norm()

    @property
    def duality_gap(self):
        """Primal less dual objective, `(outputs,)`: a bound on what is missing to the best."""
        return self.primal_objective - self.dual_objective

    def _squared_norm(self):
        coefficients = self.dual_coefficients
        return np.sum(coefficients * (self.kernel_of_examples @ coefficients), axis=0)

    @property
    def weight_matrix(self):
        r"""\(W = \sum_j \beta_j\,\Phi(T(k_j))^\top / h(T(k_j))\), `(outputs, F)`.

        Raises:
            ValueError: if the feature map has no end.
        """
        features, log_scale = self._features()
        share = np.exp(log_divided(log_scale, self.log_normalizer))
        return self.dual_coefficients.T @ (share[:, np.newaxis] * features)

    def to_layer(self, **kwargs):
        """The regression as attention to the training set, which the layer holds.

        Args:
            **kwargs: `name` and `dtype`, as for any layer.

        Returns:
            A built `layers.SupportVectorAttention`, a `PrimalDualAttention`: queries
            `(batch, T, D)` to `(batch, T, outputs)`.
        """
        layer = SupportVectorAttention(
            len(self.keys), self.keys.shape[1], self.targets.shape[1], primal=self.primal, **kwargs
        )
        layer.build((None, None, self.keys.shape[1]))
        layer.assign(self.keys, self.values, self.intercept, self.problem.weights)
        return layer

    def to_primal_layer(self, dtype=None, **kwargs):
        r"""The regression as an ordinary neural network: features, then a dense layer.

        \[ f(x) = W\,\frac{\Phi(T(x))}{h(T(x))} + b \]

        It needs neither keys nor values, and costs the same however many there were.

        Args:
            dtype: dtype of its layers; Keras's default if `None`.
            **kwargs: `name`, as for any model.

        Returns:
            A `keras.Sequential` of `layers.NormalizedFeatures` and
            `keras.layers.Dense`: queries `(batch, T, D)` to `(batch, T, outputs)`.

        Raises:
            ValueError: if the feature map has no end.
        """
        features, log_scale = self._features()
        # Features and normaliser may be beyond floats; their ratio, which counts, is not.
        largest = log_scale.max()
        normalizer = np.exp(log_scale - largest) @ features
        normalized = NormalizedFeatures(self.primal, dtype=dtype)
        dense = keras.layers.Dense(self.targets.shape[1], dtype=dtype)
        model = keras.Sequential([normalized, dense], **kwargs)
        model.build((None, None, self.keys.shape[1]))
        normalized.assign(self.problem.examples, normalizer, self.problem.weights)
        dense.kernel.assign(self.weight_matrix.T * np.exp(-largest))
        dense.bias.assign(self.intercept)
        return model

    def _features(self):
        """Features of the examples, `(M, F)`, and logarithms `(M,)` of factors on them."""
        feature_map = self.primal.feature_map
        if not feature_map.is_finite:
            raise ValueError(
                "The feature map has no end, so there is no matrix to write down: the regression "
                "has its dual form, `to_layer()`, only. "
                f"Received: feature_map={feature_map!r}"
            )
        key = widen(self.problem.transformed_keys())
        features, log_scale = feature_map.key_features(key, self.problem.weights[-1])
        log_scale = ops.zeros_like(features[..., 0]) if log_scale is None else log_scale
        return tuple(to_float64(x)[0, self.examples, 0] for x in (features, log_scale))
