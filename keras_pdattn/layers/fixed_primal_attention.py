"""What the named layers share."""

from keras_pdattn.layers.primal_dual_attention import PrimalDualAttention


class FixedPrimalAttention(PrimalDualAttention):
    """A layer whose own arguments, those of transforms and training set, describe the primal."""

    def get_config(self):
        config = super().get_config()
        del config["primal"]
        for member in (*self.primal.transform, self.primal.training_set):
            config.update(member.get_config())
        return config
