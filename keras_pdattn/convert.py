"""Existing models with the attention of another primal problem, and their weights."""

import functools
import inspect
import warnings

import keras
from keras.src.models.functional import Functional  # Which has no public name.

from keras_pdattn import descriptions, primals
from keras_pdattn.layers.primal_dual_attention import PrimalDualAttention
from keras_pdattn.layers.transformer_decoder import TransformerDecoder
from keras_pdattn.layers.transformer_encoder import TransformerEncoder
from keras_pdattn.training_sets import AllKeys, SlidingWindow

_HUB = "keras_hub.src"
_MODELING = f"{_HUB}.layers.modeling"

#: What layers become, by the full name of their class, which need not be imported.
_REPLACED = {
    "keras.src.layers.attention.multi_head_attention.MultiHeadAttention": PrimalDualAttention,
    f"{_MODELING}.cached_multi_head_attention.CachedMultiHeadAttention": PrimalDualAttention,
    f"{_MODELING}.transformer_encoder.TransformerEncoder": TransformerEncoder,
    f"{_MODELING}.transformer_decoder.TransformerDecoder": TransformerDecoder,
}

#: Blocks whose attention layers may be replaced: the names of the attributes that hold these.
_BLOCKS = {
    f"{_HUB}.models.clip.clip_layers.CLIPEncoderLayer": ("attention",),
    f"{_HUB}.models.deit.deit_layers.DeiTEncoderBlock": ("mha",),
    f"{_HUB}.models.dinov2.dinov2_layers.DINOV2Attention": ("attention",),
    f"{_HUB}.models.metaclip_2.metaclip_2_layers.MetaCLIP2EncoderLayer": ("attention",),
    f"{_HUB}.models.siglip.siglip_layers.SigLIPEncoderLayer": ("self_attn",),
    f"{_HUB}.models.vit.vit_layers.ViTEncoderBlock": ("mha",),
}


def convert(model, primal):
    r"""Returns a copy of a model whose attention layers have another primal problem.

    `keras.layers.MultiHeadAttention`, `keras_hub.layers.CachedMultiHeadAttention`,
    `TransformerEncoder` and `TransformerDecoder` become layers of this package, with the weights
    they have, wherever they are: in Functional and Sequential models, in models inside of these,
    in KerasHub's backbones and tasks, and in blocks that are registered. With `primal="softmax"`
    the copy computes what the model does; with another one it is a start for fine-tuning.

    The copy has the class of the model, and its methods: a `GPT2CausalLM` generates. It saves,
    and loads wherever `keras_pdattn` is imported. It is not compiled, as a compiled model's
    optimiser has variables for other weights; a task is, as it is when it is made.

    A warning names the layers that stay as they are, and says why.

    Masking, causality and cost: those of the layers and the primal problem. Whoever hands padding
    or causality to attention as an `attention_mask` leaves nothing to take statistics, means or
    positions of padding from: layers that are called so in a graph stay, where the primal problem
    needs these, and so does attention inside of blocks that are not registered.
    `CachedMultiHeadAttention` ignores the masks that Keras attaches to tensors; its successor
    does not.

    Args:
        model: a `keras.Model`, built: Functional, Sequential, a backbone or a task of KerasHub.
        primal: a `keras_pdattn.Primal`, its name or its config; or a function that gives one,
            or `None` to leave the layer, for the path of a layer, such as
            `"transformer_layer_0"`, and its index among those that can be converted.

    Returns:
        The copy.

    Raises:
        ValueError: if the model is not built, is converted or quantised already, has LoRA
            adapters or no layer that can be converted, or a primal problem has no meaning
            for a layer.

    Example:

    ```python
    import keras
    import keras_pdattn

    x = keras.Input((None, 16))
    model = keras.Model(x, keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)(x, x))
    converted = keras_pdattn.convert(model, "batch_norm")
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    _check(model)
    copy = _copy(model)
    found, left = _search(copy)
    primal_of = primal if callable(primal) else (lambda path, index: primal)
    chosen = []
    for index, (path, layer) in enumerate(found):
        its_primal = primal_of(path, index)
        if its_primal is None:
            left.append((path, layer, "`primal` gave None for it"))
            continue
        its_primal = primals.get(its_primal)
        if _is_called_with_a_mask(layer) and not _takes_any_mask(its_primal):
            reason = "it is called with an `attention_mask`, which no statistics can be taken from"
            left.append((path, layer, f"{reason}; `value_mask` and `use_causal_mask` can"))
        else:
            chosen.append((path, layer, its_primal))
    if not chosen:
        raise ValueError(
            "There is no attention layer in the model that can be converted. "
            f"Received: {type(model).__name__} with {_listed(left) or 'none at all'}"
        )
    if left:
        warnings.warn(f"Not converted: {_listed(left)}", stacklevel=2)
    primal_by_layer = {id(layer): its_primal for _, layer, its_primal in chosen}
    undescribed = [
        (one, _by_place(one, primal_by_layer)) for one in _undescribed(copy, primal_by_layer)
    ]
    for path, layer, its_primal in chosen:
        try:
            _replace(layer, its_primal)
        except ValueError as error:
            raise ValueError(f"`{path}` can't be converted. {error}") from error
    for one, by_place in undescribed:
        _describe(one, by_place)
    _track_new_weights(copy)
    return copy


def _listed(left):
    """Layers and reasons in words."""
    return "; ".join(f"`{path}` ({type(layer).__name__}): {why}" for path, layer, why in left)


def register_block(block, *attributes):
    """Lets `convert` replace the attention layers that a block of yours holds.

    The block's `call` has to hand padding to them as `query_mask`, `value_mask` or `key_mask` (or
    to have none), and causality as `use_causal_mask`, as statistics and windows need to tell
    these from other masks.

    Args:
        block: a subclass of `keras.layers.Layer`; its own subclasses are not meant.
        *attributes: names of the attributes that hold a `keras.layers.MultiHeadAttention`.

    Raises:
        ValueError: if `block` is no such class, or there is no attribute.

    Example:

    ```python
    import keras
    import keras_pdattn

    @keras.saving.register_keras_serializable(package="my_package")
    class Block(keras.layers.Layer):
        def build(self, shape):
            self.attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)
            self.attention.build(shape, shape)

        def call(self, x):
            return x + self.attention(x, x)

    keras_pdattn.register_block(Block, "attention")
    ```

    Reference:
        Nguyen et al., "A Primal-Dual Framework for Transformers and Neural
        Networks", ICLR 2023 (arXiv:2406.13781).
    """
    if not (isinstance(block, type) and issubclass(block, keras.layers.Layer)) or not attributes:
        raise ValueError(
            "`block` must be a subclass of `keras.layers.Layer`, followed by names of attributes. "
            f"Received: block={block!r}, attributes={attributes}"
        )
    _BLOCKS[_key(block)] = attributes


def _check(model):
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a `keras.Model` that is built. Received: model={model!r}"
        )
    if any(isinstance(one, Converted) for one in _layers_of(model)):
        raise ValueError(
            "A model is converted once; convert the one it came from. "
            f"Received: a model that is, {model.name}"
        )
    if any(getattr(one, "quantization_mode", None) for one in _layers_of(model)):
        raise ValueError(
            "A model is converted first, and quantised then. "
            f"Received: a model that is, {model.name}"
        )
    adapted = [one.path for one in _layers_of(model) if getattr(one, "lora_enabled", False)]
    if adapted:
        raise ValueError(
            "A model is converted first, and adapted by LoRA then. "
            f"Received: a model with adapters in {', '.join(adapted)}"
        )


def _layers_of(model):
    """All layers, the model among them."""
    return model._flatten_layers(include_self=True)


def _copy(model):
    """The same model with variables of its own, not compiled."""
    config = model.get_config()
    if _is_task(model):
        # The config of a preprocessor has no vocabulary.
        parts = {"backbone": _copy(model.backbone), "preprocessor": model.preprocessor}
        copy = type(model).from_config({**config, **parts})
    else:
        description = keras.saving.serialize_keras_object(model)
        description.pop("compile_config", None)
        with keras.saving.custom_object_scope({type(model).__name__: type(model)}):
            copy = keras.saving.deserialize_keras_object(description, safe_mode=False)
    for ours, theirs in zip(copy.variables, model.variables, strict=True):
        # JAX would share the array, and training the one donate it away from the other.
        ours.assign(keras.ops.copy(theirs.value))
    for ours, theirs in zip(_with_weights(copy), _with_weights(model), strict=True):
        if ours.trainable != theirs.trainable:
            ours.trainable = theirs.trainable
    return copy


def _with_weights(model):
    """The layers that have any: a task keeps track of a preprocessor that was taken from it."""
    return [layer for layer in _layers_of(model) if layer.weights]


def _is_task(model):
    """Whether a model is made from a backbone, as KerasHub's tasks are."""
    has_parts = hasattr(model, "preprocessor")
    return has_parts and isinstance(getattr(model, "backbone", None), keras.Model)


def _search(model):
    """Finds the layers that can be replaced, and the attention layers that can't.

    Returns:
        `(found, left)`: lists of `(path, layer)`, and of `(path, layer, reason)`, in an order that
        depends on nothing but the model's class and config.
    """
    found, left = [], []
    for layer, container in _attention_layers(model):
        path, name = layer.path or layer.name, type(layer).__name__
        if _is_ours(layer):
            reason = "it has a primal problem"
        elif _key_of(layer) in _REPLACED:
            reason = _reason_to_leave(container, layer)
        elif isinstance(layer, keras.layers.MultiHeadAttention):
            reason = f"{name} may compute something else"
        else:
            reason = f"{name} has an attention of its own"
        found.append((path, layer)) if reason is None else left.append((path, layer, reason))
    return found, left


def _attention_layers(layer):
    """Pairs of each layer for attention in `layer`, or that itself, and what holds it."""
    found, seen = [], set()

    def visit(one, container):
        if id(one) in seen:
            return
        seen.add(id(one))
        is_known = _is_ours(one) or _key_of(one) in _REPLACED
        if is_known or isinstance(one, keras.layers.MultiHeadAttention):
            found.append((one, container))
            return
        before = len(found)
        for child in _children(one):
            visit(child, one)
        if "Attention" in type(one).__name__ and len(found) == before:
            found.append((one, container))

    visit(layer, None)
    return found


def _is_ours(layer):
    return isinstance(layer, tuple(_REPLACED.values()))


def _key_of(layer):
    return _key(type(layer))


def _key(cls):
    """The full name of a class, its subclasses excluded."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_called_with_a_mask(layer):
    """Whether the graph that a layer is part of hands it an `attention_mask`."""
    if not isinstance(layer, keras.layers.MultiHeadAttention):
        return False
    arguments = [node.arguments for node in layer._inbound_nodes]
    bound = [layer._call_signature.bind(*one.args, **one.kwargs).arguments for one in arguments]
    return any(one.get("attention_mask") is not None for one in bound)


def _takes_any_mask(primal):
    """Whether all that a mask can do to a primal problem is to restrict its sums."""
    return not primal.transform and type(primal.training_set) in (AllKeys, SlidingWindow)


def _reason_to_leave(container, attention):
    """Why `container` has to keep an attention layer; `None` if it can be replaced."""
    is_attention = _REPLACED[_key_of(attention)] is PrimalDualAttention
    if is_attention and type(attention) is not keras.layers.MultiHeadAttention:
        if attention._use_gate or attention._sliding_window is not None:
            return f"{type(attention).__name__} ignores its gate and window"
        if any(len(node.arguments.args) > 3 for node in attention._inbound_nodes):
            return "it is called with masks or caches by position, which ours have elsewhere"
    attributes = _BLOCKS.get(_key_of(container), ())
    is_named = any(getattr(container, one) is attention for one in attributes)
    if not is_attention or is_named or _has_graph(container):
        return None
    return f"`register_block` has not been told of {type(container).__name__}"


def _has_graph(model):
    """Whether a model's calls of its layers are there to be seen."""
    return isinstance(model, (Functional, keras.Sequential))


def _children(layer):
    """The layers that a layer holds itself."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _replace(layer, primal):
    """Makes a built layer, in place, one of ours with the same weights.

    All that refers to it goes on doing so: the graph of a Functional model, attributes of blocks
    and tasks, lists of variables.
    """
    attention_layers = [one for one in _children(layer) if _key_of(one) in _REPLACED]
    layer.__class__ = _REPLACED[_key_of(layer)]
    # What `keras.layers.Layer` finds out about a class when an instance is made.
    layer._call_signature = inspect.signature(layer.call)
    layer.call_signature_parameters = list(layer._call_signature.parameters)
    layer.adopt(primal)
    for one in attention_layers:
        is_cross = one is getattr(layer, "_cross_attention_layer", None)
        _replace(one, layer.cross_attention_primal if is_cross else primal)


def _track_new_weights(model):
    """Has torch's modules list the weights of replaced layers as well."""
    for layer in _layers_of(model):
        if hasattr(layer, "_track_variables"):
            layer._track_variables()


def _undescribed(layer, primal_by_layer):
    """The models and blocks, outermost ones, whose config does not tell of replaced layers."""
    replaced = [one for one in _layers_of(layer) if id(one) in primal_by_layer]
    if id(layer) in primal_by_layer or not replaced:
        return []
    if _is_task(layer):
        within = {id(one) for one in _layers_of(layer.backbone)}
        others = [] if all(id(one) in within for one in replaced) else [layer]
        return others + _undescribed(layer.backbone, primal_by_layer)
    if type(layer) in (Functional, keras.Sequential):
        return [one for child in layer.layers for one in _undescribed(child, primal_by_layer)]
    return [layer]


def _places(layer):
    """All layers in `layer` that could be replaced or are, whatever blocks are registered."""
    found = [one for one, _ in _attention_layers(layer)]
    return [one for one in found if _is_ours(one) or _key_of(one) in _REPLACED]


def _by_place(layer, primal_by_layer):
    """Primal problems by the places of their layers in `layer`."""
    return {
        str(place): primal_by_layer[id(one)]
        for place, one in enumerate(_places(layer))
        if id(one) in primal_by_layer
    }


def _describe(layer, primal_by_place):
    """Has a model or a block tell in its config which of its layers are replaced."""
    layer._primal_by_place = primal_by_place
    layer.__class__ = _converted_class(type(layer))


@functools.cache
def _converted_class(cls):
    name, body = Converted.__name__, {"__module__": Converted.__module__, "__doc__": cls.__doc__}
    converted = type(name, (Converted, cls), body)
    register = keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
    register(converted)
    register(Converted)  # The one that reads all of them.
    return converted


@keras.saving.register_keras_serializable(package=descriptions.PACKAGE)
class Converted:
    """Mixed into the class of a model or block that holds replaced attention layers.

    Its own config would bring back the layers that were there; to that this adds which of them
    have which primal problem.
    """

    def __reduce__(self):
        # Pickled by a class that can be imported.
        _, arguments = super().__reduce__()
        return keras.Model._unpickle_model, arguments

    def get_config(self):
        cls = type(self).__mro__[2]
        return {
            "original": {
                "module": cls.__module__,
                "class_name": cls.__name__,
                "registered_name": keras.saving.get_registered_name(cls),
                "config": keras.saving.serialize_keras_object(super().get_config()),
                "build_config": self.get_build_config(),
            },
            "primals": {
                place: primals.serialize(primal) for place, primal in self._primal_by_place.items()
            },
        }

    @classmethod
    def from_config(cls, config):
        layer = keras.saving.deserialize_keras_object(config["original"])
        by_place = {place: primals.get(primal) for place, primal in config["primals"].items()}
        places = _places(layer)
        for place, primal in by_place.items():
            # A container may have brought back its layers as they were saved.
            if not _is_ours(places[int(place)]):
                _replace(places[int(place)], primal)
        _describe(layer, by_place)
        _track_new_weights(layer)
        return layer
