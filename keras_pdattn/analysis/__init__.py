"""What a model's heads attend to, how much they repeat each other, and plots of both."""

from keras_pdattn.analysis.cost import cost
from keras_pdattn.analysis.plots import (
    plot_attention,
    plot_cost,
    plot_redundancy,
    plot_support_vectors,
)
from keras_pdattn.analysis.redundancy import head_redundancy
from keras_pdattn.analysis.scores import attention_scores
from keras_pdattn.analysis.tables import cost_table

__all__ = [
    "attention_scores",
    "cost",
    "cost_table",
    "head_redundancy",
    "plot_attention",
    "plot_cost",
    "plot_redundancy",
    "plot_support_vectors",
]
