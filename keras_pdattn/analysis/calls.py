"""What each attention layer of a model is called with, and the scores it computes."""

import contextlib
import functools
import inspect
from typing import Any, NamedTuple

import keras

from keras_pdattn.layers.masking import get_keras_mask
from keras_pdattn.ops import dtypes

#: Ours are among the first, `keras.layers.AdditiveAttention` is among the last.
ATTENTION_LAYERS = (
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
    keras.layers.Attention,
)


class AttentionCall(NamedTuple):
    """One call of an attention layer.

    Attributes:
        layer: the layer.
        arguments: dict from the name of each argument of its `call` to its value,
            defaults included. For every kind of layer it holds `query`, `value`
            (`None` if the layer has its own) and `key` (the value, if none was
            given), and `query_mask`, `value_mask` and `key_mask`: the mask that
            was passed, else the one Keras attached to the tensor, else `None`.
        scores: NumPy array of its scores, as the layer lays them out.
    """

    layer: keras.layers.Layer
    arguments: dict[str, Any]
    scores: Any


def attention_calls(model, inputs, training=False):
    """Runs a model once, and records the calls of its attention layers.

    The model is run eagerly and left as it was: what the call sets on layers,
    their moving statistics and their seeds are put back, also after an error. A
    model that is not built yet is built first.

    Cost: one call that computes all scores, queries times keys for each head,
    sequence and layer, which are all kept.

    Args:
        model: a `keras.Model`, an attention layer, or any layer with some inside.
        inputs: what to call it on. A layer that is not a `keras.Model` takes the
            items of a tuple as its arguments, those of a dict as its keywords.
        training: whether to run it as in training.

    Returns:
        List of `AttentionCall`, in the order of the calls.

    Raises:
        ValueError: if `model` is not a layer or holds no attention layer; if
            `inputs` are symbolic or not the arguments of the layer; if a layer uses
            flash attention or has no `return_attention_scores`, and so can't return
            scores.

    Example:

    ```python
    import numpy as np
    from keras_pdattn import layers
    from keras_pdattn.analysis.calls import attention_calls

    x = np.ones((2, 10, 32), dtype="float32")
    attention = layers.BatchNormAttention(num_heads=4, key_dim=8)
    (call,) = attention_calls(attention, (x, x))
    call.arguments["value"].shape  # (2, 10, 32)
    call.scores.shape  # (2, 4, 10, 10)
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(f"`model` must be a Keras model or layer. Received: model={model!r}")
    if any(keras.backend.is_keras_tensor(x) for x in keras.tree.flatten(inputs)):
        raise ValueError(
            f"`inputs` must be arrays or tensors, not symbolic. Received: inputs={inputs!r}"
        )
    _check_arguments(model, inputs)
    _check_scores(_attention_layers(model))
    if not all(layer.built for layer in model._flatten_layers()):
        _run(model, inputs, training=False)
    # Building may have made some.
    attention_layers = _attention_layers(model)
    _check_scores(attention_layers)
    if not attention_layers:
        raise ValueError(f"`model` has no attention layer. Received: model={model!r}")
    calls = []
    with _unchanged(model):
        for layer in attention_layers:
            vars(layer)["call"] = _recorded(layer, calls)
        _run(model, inputs, training)
    return calls


def symbolic_calls(model, input_shape):
    """Traces a built model on a shape, and records the calls of its attention layers.

    Nothing is computed, and the model is left as it was.

    Args:
        model: a built `keras.Model`, or any layer with attention layers inside.
        input_shape: the shape of its input, or such shapes in the structure that
            it takes.

    Returns:
        List of pairs of a layer and the dict of its arguments, as in
        `AttentionCall`, whose tensors have a shape and nothing more.

    Raises:
        ValueError: if the model is not built.
    """
    if not all(layer.built for layer in model._flatten_layers()):
        raise ValueError(
            "A model must be built before it can be traced: call it once. "
            f"Received: model={model!r}"
        )
    calls = []
    with _unchanged(model):
        for layer in _attention_layers(model):
            vars(layer)["call"] = _noted(layer, calls)
        inputs = _specs(model, input_shape)
        try:
            _Trace(model, calls).compute_output_spec(inputs)
        except Exception as error:  # Whatever the model's own code raises.
            raise ValueError(
                f"The model can't be called on inputs of this shape: {error.__cause__ or error}. "
                f"Received: input_shape={input_shape}"
            ) from error
    return calls


class _Trace(keras.Operation):
    """Runs a model on shapes; the model itself would ask each of its layers for shapes instead."""

    def __init__(self, model, calls):
        super().__init__()
        self.model, self.calls = model, calls

    def call(self, inputs):
        # Keras may try twice, on torch.
        self.calls.clear()
        return self.model(inputs)


def _specs(model, shape):
    """Symbolic inputs of the given shapes, of the dtypes that a model knows of its inputs."""
    known = list(getattr(model, "inputs", None) or ())
    if isinstance(shape, dict):
        dtypes_ = {x.name: x.dtype for x in known}
        return {name: keras.KerasTensor(x, dtype=dtypes_.get(name)) for name, x in shape.items()}
    is_one = not isinstance(shape[0], (tuple, list))
    shapes = [shape] if is_one else shape
    if known and len(known) != len(shapes):
        raise ValueError(
            f"`input_shape` must hold a shape for each of the model's {len(known)} inputs. "
            f"Received: input_shape={shape}"
        )
    inputs = [
        keras.KerasTensor(x, dtype=spec.dtype if spec is not None else None)
        for x, spec in zip(shapes, known or [None] * len(shapes))
    ]
    return inputs[0] if is_one else inputs


def _noted(layer, calls):
    """The `call` of `layer`, which appends to `calls`."""
    call = layer.call
    signature = inspect.signature(call)

    @functools.wraps(call)
    def noted(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append((layer, _in_one_vocabulary(_by_name(bound))))
        return call(*args, **kwargs)

    return noted


def _attention_layers(model):
    return [x for x in model._flatten_layers() if isinstance(x, ATTENTION_LAYERS)]


def _check_scores(layers):
    """Raises unless all of `layers` can return their scores."""
    for layer in layers:
        if getattr(layer, "_flash_attention", False):
            raise ValueError(
                "A layer with flash attention can't return attention scores. "
                f"Received: layer {layer.name!r} with flash_attention=True"
            )
        parameters = inspect.signature(layer.call).parameters.values()
        if not any(
            x.name == "return_attention_scores" or x.kind is x.VAR_KEYWORD for x in parameters
        ):
            raise ValueError(
                "An attention layer must take `return_attention_scores` for its scores to be read. "
                f"Received: layer {layer.name!r} of type {type(layer).__name__}, which does not"
            )


def _check_arguments(model, inputs):
    """Raises unless `inputs` hold the arguments of `model`."""
    args, kwargs = _arguments(model, inputs)
    try:
        inspect.signature(model.call).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"`inputs` must hold the arguments of {type(model).__name__}, several as a tuple or "
            f"a dict: {error}. Received: inputs of type {type(inputs).__name__}"
        ) from error


def _arguments(model, inputs):
    """What `model` is called with, by position and by name."""
    if isinstance(inputs, tuple) and not isinstance(model, keras.Model):
        return inputs, {}
    if isinstance(inputs, dict) and not isinstance(model, keras.Model):
        return (), inputs
    return (inputs,), {}


def _run(model, inputs, training):
    args, kwargs = _arguments(model, inputs)
    return model(*args, **kwargs, training=training)


@contextlib.contextmanager
def _unchanged(model):
    """Puts back the attributes and the state of `model` and the layers in it.

    Attributes are written to their dict, past Keras and torch, which track what is set on a layer.
    """
    attributes = [(vars(layer), dict(vars(layer))) for layer in model._flatten_layers()]
    for current, _ in attributes:
        # What is rematerialised, JAX traces: there would be no scores to read.
        current["_remat_mode"] = None
    try:
        with keras.StatelessScope():
            yield
    finally:
        for current, before in attributes:
            current.clear()
            current.update(before)


def _recorded(layer, calls):
    """The `call` of `layer`, which appends to `calls` and returns what its caller asks for."""
    call = layer.call
    signature = inspect.signature(call)

    @functools.wraps(call)
    def recorded(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given = _by_name(bound)
        bound.apply_defaults()
        arguments = _in_one_vocabulary(_by_name(bound))
        result = call(**{**given, "return_attention_scores": True})
        output, scores, *others = result
        if scores is None:
            raise ValueError(
                "An attention layer must compute scores when asked to. "
                f"Received: scores=None from layer {layer.name!r}"
            )
        scores = keras.ops.convert_to_numpy(dtypes.widen(scores))
        calls.append(AttentionCall(layer, arguments, scores))
        if given.get("return_attention_scores", False):
            return result
        return (output, *others) if others else output

    return recorded


def _by_name(bound):
    """The arguments of a call as a dict, those for `**kwargs` under their own names."""
    arguments = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def _in_one_vocabulary(arguments):
    """The arguments with query, value, key and their masks as `AttentionCall` says."""
    arguments = dict(arguments)
    names = ("query", "value", "key")
    if "inputs" in arguments:  # `keras.layers.Attention` takes lists of them.
        arguments.update(zip(names, arguments.pop("inputs")))
        masks = arguments.pop("mask", None) or ()
        arguments.update(zip([f"{name}_mask" for name in names], masks))
    value = arguments.setdefault("value", None)
    if arguments.get("key") is None:
        arguments["key"] = value
    for name in names:
        if arguments.get(f"{name}_mask") is None:
            # Read now, as the call may take it off.
            arguments[f"{name}_mask"] = get_keras_mask(arguments[name])
    return arguments
