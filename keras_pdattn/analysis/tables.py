"""Costs as a table."""

from rich.table import Table

from keras_pdattn.analysis.cost import cost


def cost_table(layer_or_model, input_shape, lengths, **call):
    """Tabulates what attention costs as sequences grow.

    Args:
        layer_or_model: as for `cost`.
        input_shape: as for `cost`; the axis behind the batch, of all inputs alike,
            gets each length in turn.
        lengths: positive integers.
        **call: `use_causal_mask`, `attention_mask` and `return_attention_scores`, for
            a layer.

    Returns:
        A `rich.table.Table`, for `rich.print`: multiply-adds of the heads and with
        projections, their growth from the length before, and bytes of activations.

    Raises:
        ValueError: as `cost`.

    Example:

    ```python
    import rich
    from keras_pdattn import analysis, layers

    table = analysis.cost_table(layers.LinearAttention(8, 32), (1, 256, 256), [256, 512])
    rich.print(table)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    table = Table(title="Cost of attention")
    columns = ("length", "heads", "times", "with projections", "activations", "parameters")
    for column in columns:
        table.add_column(column, justify="right")
    before = None
    for length in lengths:
        found = cost(layer_or_model, _at_length(input_shape, length), **call)
        table.add_row(
            f"{length:,}",
            readable(found.attention),
            "" if before is None else f"{found.attention / before:.2f}",
            readable(found.multiply_adds),
            f"{readable(found.activation_bytes)}B",
            readable(found.parameters),
        )
        before = found.attention
    return table


def _at_length(shape, length):
    if isinstance(shape, dict):
        return {name: _at_length(one, length) for name, one in shape.items()}
    if isinstance(shape[0], (tuple, list, dict)):
        return [_at_length(one, length) for one in shape]
    return (shape[0], length, *shape[2:])


def readable(number):
    """A count with a decimal prefix: 1,234,567 is 1.23 M."""
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.3g} {prefix}"
    return f"{number} "
