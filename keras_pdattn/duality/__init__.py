"""Support vector regression as attention, and attention as support vector regression."""

from keras_pdattn.duality.regression import SupportVectorRegression, fit
from keras_pdattn.duality.trained_heads import (
    SupportVectors,
    dual_coefficients,
    support_vectors,
)

__all__ = [
    "SupportVectorRegression",
    "SupportVectors",
    "dual_coefficients",
    "fit",
    "support_vectors",
]
