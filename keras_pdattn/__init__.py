"""The attention family of primal-dual theory, for Keras 3."""

from keras_pdattn import (
    analysis,
    distribution,
    duality,
    feature_maps,
    layers,
    ops,
    primals,
    training_sets,
    transforms,
)
from keras_pdattn.convert import convert, register_block
from keras_pdattn.primals import Primal

__version__ = "0.1.0"

__all__ = [
    "Primal",
    "analysis",
    "convert",
    "distribution",
    "duality",
    "feature_maps",
    "layers",
    "ops",
    "primals",
    "register_block",
    "training_sets",
    "transforms",
]
