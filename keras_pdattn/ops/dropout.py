"""Dropout that drops the same entries whenever a block of queries is worked again."""

import keras
from keras import ops

#: Sets the seeds of blocks apart, further than calls count up.
_STRIDE = 1_000_003


class Dropout:
    """Drops entries of a tensor at random, and scales up what it keeps.

    The seed is drawn once. A backward pass that works a block again, or a compiled loop
    over blocks, would otherwise draw anew.

    Args:
        rate: share of entries to drop, in (0, 1).
        seed: an integer or a `keras.random.SeedGenerator`.
    """

    def __init__(self, rate, seed):
        self.rate, self.seed = rate, seed
        if isinstance(seed, keras.random.SeedGenerator) and not _draws_by_itself(seed):
            self.seed = _Given(seed.next())

    def __call__(self, x):
        return keras.random.dropout(x, self.rate, seed=self.seed)

    def of_block(self, index):
        """The dropout of a block of queries."""
        if not isinstance(self.seed, _Given):
            return self
        first, second = self.seed.value[:1], self.seed.value[1:]
        first = first + ops.cast(index, first.dtype) * _STRIDE
        return type(self)(self.rate, _Given(ops.concatenate([first, second])))


def _draws_by_itself(seed):
    """Whether torch draws from its own generator, whose state it restores for a block."""
    return keras.backend.backend() == "torch" and seed.get_config()["seed"] is None


class _Given(keras.random.SeedGenerator):
    """A seed that has been drawn."""

    def __init__(self, value):
        self.value = value
        # Read by Keras on torch, which ignores seeds that nobody chose.
        self._initial_seed = 0

    def next(self, ordered=True):
        return self.value
