"""Dropout that drops the same entries whenever a block of queries is worked again."""

import keras
from keras import ops

#: Sets the seeds of blocks apart, further than calls count up; odd, so that none come back.
_STRIDE = 1_000_003
#: Sets parts of the examples apart, and from all blocks: no multiple of what these are apart.
_BETWEEN_PARTS = 500_009
#: Sets the blocks of pieces apart, further than blocks count up.
_MOST_BLOCKS = 2**20


class Dropout:
    """Drops entries of a tensor at random, and scales up what it keeps.

    The seed is drawn once. A backward pass that works a block again, or a compiled loop
    over blocks, would otherwise draw anew.

    Args:
        rate: share of entries to drop, in (0, 1).
        seed: a non-negative integer or a `keras.random.SeedGenerator`.
        group: which group of heads it is for; an integer alone would serve all alike.
    """

    def __init__(self, rate, seed, group=0):
        self.rate, self.seed = rate, seed
        if not isinstance(seed, keras.random.SeedGenerator):
            # As Keras makes a seed of an integer, but for the group.
            dtype = "int32" if keras.backend.backend() == "torch" else "uint32"
            self.seed = _Given(ops.convert_to_tensor([seed, group], dtype=dtype))
        elif not (isinstance(seed, _Given) or _draws_by_itself(seed)):
            self.seed = _Given(seed.next())

    def __call__(self, x):
        return keras.random.dropout(x, self.rate, seed=self.seed)

    def of_block(self, index):
        """The dropout of a block of queries."""
        return self._moved(index, _STRIDE)

    def of_piece(self, index):
        """The dropout of a piece of queries, an integer, which have blocks of their own."""
        # Torch adds the two numbers of a seed up: a piece that moved the other would meet blocks.
        return self.of_block(index * _MOST_BLOCKS)

    def of_part(self, index):
        """The dropout of the weights of a part of the examples, an integer."""
        return self._moved(index, _BETWEEN_PARTS) if index else self

    def _moved(self, count, stride):
        if not isinstance(self.seed, _Given):
            return self
        stride = ops.convert_to_tensor([stride, 0], dtype=self.seed.value.dtype)
        return type(self)(
            self.rate, _Given(self.seed.value + ops.cast(count, stride.dtype) * stride)
        )


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
