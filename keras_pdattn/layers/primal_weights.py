"""The weights of the members of a layer's primal problem."""

import keras


class PrimalWeights(keras.layers.Layer):
    """Holds what the members of a primal problem learn or draw, apart from the projections.

    A sublayer of its own, made last: the projections keep the positions and
    paths they have in `keras.layers.MultiHeadAttention`.
    """

    def __init__(self, members, **kwargs):
        super().__init__(**kwargs)
        self.members = members

    def build(self, heads_and_depth):
        self.by_member = [
            member.build(self._adder(f"{type(member).__name__}_{index}"), *heads_and_depth)
            for index, member in enumerate(self.members)
        ]

    def assign(self, by_member):
        """Takes over weights: a list with a dict for each member, in order."""
        for variables, weights in zip(self.by_member, by_member):
            for name, variable in variables.items():
                variable.assign(weights[name])

    def _adder(self, prefix):
        def add_weight(*args, name="weight", **kwargs):
            return self.add_weight(*args, name=f"{prefix}_{name}", **kwargs)

        return add_weight
