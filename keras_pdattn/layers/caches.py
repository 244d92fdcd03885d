"""What an attention layer keeps of the tokens it has seen, so that new ones are worked alone.

A cache is a tensor, or a dict of tensors, with the batch as first axis and of one shape and
dtype for ever, as samplers want it. There are three:

- keys and values by position, `(batch, 2, length, heads, depth)` as in KerasHub, with a third
  plane for queries where a transform looks back at them;
- those of a sliding window alone, in a ring of its size;
- the state of a finite feature map, whose size does not depend on the length.
"""

import dataclasses
import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_pdattn.layers.masking import attach_mask, get_keras_mask
from keras_pdattn.ops import masks, native, recurrence
from keras_pdattn.ops.dtypes import accumulator, cast, nothing
from keras_pdattn.ops.indexing import (
    append_axes,
    fit_axis,
    start_at,
    take_along_time,
    zero_where_masked,
)
from keras_pdattn.training_sets import AllKeys, SlidingWindow


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens that a cached call brings, projected, and what limits them.

    Attributes:
        query: `(B, T, H, D)`.
        key: `(B, n, H, D)`; `None` where the cache stays as it is, as the next two.
        value: `(B, n, H, Dv)`.
        index: position of the first query, and of the first key of these.
        query_mask: boolean `(B, T)`, or `None`.
        key_masks: tuple of booleans of these keys, `(B, n)`, or of all positions, `(B, S)`.
        attention_mask: boolean `(T, S)` or `(B, T, S)` or `(B, H, T, S)`; or `None`.
        is_causal: whether queries see no later key.
        training: whether dropout is active.
    """

    query: Any
    key: Any
    value: Any
    index: Any
    query_mask: Any
    key_masks: tuple
    attention_mask: Any
    is_causal: bool
    training: Any

    @property
    def are_first(self):
        """Whether it is known that no tokens come before them."""
        return isinstance(self.index, int) and self.index == 0

    @property
    def key_mask(self):
        """All of `key_masks`, once they have one shape."""
        return functools.reduce(masks.intersect, self.key_masks, None)


class Cache:
    """One of the three; it describes tensors, and holds none."""

    def shapes(self, layer, length):
        """The shape of its tensor, or a dict of them, without the batch axis."""
        raise NotImplementedError

    def attend(self, layer, cache, tokens, solve):
        """Attends to the tokens of `cache` and new ones.

        Args:
            layer: the attention layer.
            cache: a tensor, or a dict of tensors.
            tokens: `Tokens`.
            solve: function from `Tokens`, with all keys that are attended to, to output and
                scores (or `None`).

        Returns:
            Output, scores, and the cache with these tokens.
        """
        raise NotImplementedError

    def zeros(self, layer, batch_size, length, dtype):
        """A cache without tokens."""

        def leaf(name, shape):
            shape = batch_size, *shape
            if name == "valid":
                return ops.zeros(shape, dtype="bool")
            return ops.full(shape, nothing() if name == "log_scale" else 0, dtype)

        shapes = self.shapes(layer, length)
        if isinstance(shapes, dict):
            return {name: leaf(name, shape) for name, shape in shapes.items()}
        return leaf(None, shapes)

    def complete(self, cache):
        """`cache`, for the first tokens of all, with what it may lack."""
        return cache

    def check(self, layer, cache, batch_size):
        """Raises a `ValueError` unless `cache` is one of `layer`, for so many sequences."""
        expected, received = self.shapes(layer, None), _shapes(cache)
        if isinstance(expected, dict):
            expected = {name: (batch_size, *shape) for name, shape in expected.items()}
        else:
            expected = batch_size, *expected
        fits = type(expected) is type(received)
        if fits and isinstance(expected, dict):
            fits = expected.keys() == received.keys() and all(
                masks.fits(received[name], shape, exactly=True) for name, shape in expected.items()
            )
        elif fits:
            fits = masks.fits(received, expected, exactly=True)
        if not fits:
            raise ValueError(
                f"`cache` must have the shapes {expected}, `None` being any size, and be what "
                f"`init_cache` made or a call returned. Received: cache of shape {received}"
            )


def _shapes(cache):
    if isinstance(cache, dict):
        return {name: tuple(x.shape) for name, x in cache.items()}
    return tuple(getattr(cache, "shape", ()))


@dataclasses.dataclass(frozen=True)
class KeyValueCache(Cache):
    """Keys and values by position.

    Attributes:
        look_back: how many queries before it a transform mixes into one, 0 for none; `None`
            for any number.
        is_stacked: whether they share a tensor, being equally deep.
    """

    look_back: int | None
    is_stacked: bool

    @property
    def names(self):
        """What it holds, by position."""
        return ("key", "value") if self.look_back == 0 else ("key", "value", "query")

    def shapes(self, layer, length):
        depths = {"key": layer.key_dim, "value": layer.value_dim, "query": layer.key_dim}
        if self.is_stacked:
            return len(self.names), length, layer.num_heads, layer.key_dim
        return {name: (length, layer.num_heads, depths[name]) for name in self.names}

    def complete(self, cache):
        # KerasHub's models make a cache of keys and values, and go on with what comes back.
        lacks_queries = self.is_stacked and self.look_back != 0
        if not lacks_queries or len(cache.shape) != 5 or cache.shape[1] != 2:
            return cache
        return ops.concatenate([cache, ops.zeros_like(cache[:, :1])], axis=1)

    def attend(self, layer, cache, tokens, solve):
        parts, dtype = self._parts(cache), layer.compute_dtype
        length = ops.shape(parts["key"])[1]
        if tokens.index is None:
            key, value = (cast(parts[name], dtype) for name in ("key", "value"))
            return *solve(dataclasses.replace(tokens, key=key, value=value)), cache
        _check_room(tokens, length, "cache")
        if self.look_back != 0:  # Padding is not mixed in.
            query = zero_where_masked(tokens.query, tokens.query_mask)
            tokens = dataclasses.replace(tokens, query=query)
        new = {name: getattr(tokens, name) for name in self.names}
        start = start_at(tokens.index, 1, 4)
        parts = {
            name: ops.slice_update(x, start, cast(new[name], x.dtype)) for name, x in parts.items()
        }
        cache = ops.stack(list(parts.values()), axis=1) if self.is_stacked else parts
        if tokens.are_first and self.look_back is not None:
            return *_attend_to_themselves(tokens, length, solve), cache
        among_all = dataclasses.replace(
            tokens,
            key=cast(parts["key"], dtype),
            value=cast(parts["value"], dtype),
            key_masks=_masks_of_all(tokens, parts["key"]),
        )
        if self.look_back != 0:
            return *self._attend_with_queries(among_all, cast(parts["query"], dtype), solve), cache
        return *solve(among_all), cache

    def _parts(self, cache):
        if not self.is_stacked:
            return cache
        return {name: cache[:, plane] for plane, name in enumerate(self.names)}

    def _attend_with_queries(self, tokens, queries, solve):
        """As `solve`, for queries that are mixed with the ones before them."""
        if self.look_back is None:
            query, start, before = queries, 0, tokens.index
        else:
            before = self.look_back
            start = tokens.index - before
            query = ops.concatenate([_read(queries, start, before), tokens.query], axis=1)
        query_mask = _mask_of_queries(query, start, before, tokens)
        mask = tokens.attention_mask
        if mask is not None and mask.shape[-2] != 1:
            shape = list(ops.shape(mask))
            shape[-2] = ops.shape(query)[1]
            where = start_at(before, -2, len(shape))
            mask = ops.slice_update(ops.ones(shape, dtype="bool"), where, mask)
        index = before + ops.arange(ops.shape(tokens.query)[1], dtype="int32")
        output, scores = solve(
            dataclasses.replace(
                tokens, query=query, index=start, query_mask=query_mask, attention_mask=mask
            )
        )
        scores = scores if scores is None else native.take(scores, index, axis=2)
        return take_along_time(output, index), scores


def _check_room(tokens, length, name):
    """Raises a `ValueError` if it is known that new tokens are beyond `length`."""
    count = tokens.key.shape[1]
    are_known = all(isinstance(size, int) for size in (tokens.index, count, length))
    if are_known and count != length and tokens.index + count > length:
        raise ValueError(
            f"The {name} has room for {length} tokens. "
            f"Received: cache_update_index={tokens.index} with {count} new tokens"
        )


def _attend_to_themselves(tokens, length, solve):
    """Tokens without any before them are a call of their own."""
    count = ops.shape(tokens.key)[1]
    mask = tokens.attention_mask
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., :count]
    key_masks = tuple(one[:, :count] for one in tokens.key_masks)
    output, scores = solve(dataclasses.replace(tokens, attention_mask=mask, key_masks=key_masks))
    return output, None if scores is None else fit_axis(scores, 3, length)


def _masks_of_all(tokens, key):
    """Which positions hold a token that may be seen, each `(B, S)`."""
    batch, length = ops.shape(key)[:2]
    found = []
    for mask in tokens.key_masks:
        if mask.shape[1] != key.shape[1]:
            others = ops.ones((batch, length), dtype="bool")
            mask = ops.slice_update(others, start_at(tokens.index, 1, 2), mask)
        found.append(mask)
    if not tokens.is_causal:
        filled = ops.arange(length, dtype="int32") < tokens.index + ops.shape(tokens.key)[1]
        found.append(ops.broadcast_to(filled, (batch, length)))
    return tuple(found)


def _mask_of_queries(query, start, before, tokens):
    """The mask of queries from position `start` on, `before` of which come before `tokens`.

    Of those the ones left out by a mask were zeroed, and masks of keys tell padding too.
    """
    (batch, length), (_, count) = (ops.shape(x)[:2] for x in (query, tokens.query))
    position = start + ops.arange(length, dtype="int32")
    mask = ops.broadcast_to(position >= 0, (batch, length))
    if tokens.key_mask is not None:
        is_key = take_along_time(tokens.key_mask, ops.maximum(position, 0))
        mask = mask & (is_key | ops.any(query != 0, axis=(2, 3)))
    new = tokens.query_mask
    new = ops.ones((batch, count), dtype="bool") if new is None else new
    return ops.slice_update(mask, start_at(before, 1, 2), new)


def _read(x, start, count):
    """`count` entries of `x`, `(B, S, ...)`, from `start` on; zero in front of the first."""
    position = start + ops.arange(count, dtype="int32")
    exists = ops.expand_dims(position >= 0, axis=0)
    return zero_where_masked(take_along_time(x, ops.maximum(position, 0)), exists)


@dataclasses.dataclass(frozen=True)
class WindowCache(Cache):
    """Keys and values of the last positions, each at its position modulo their number.

    Attributes:
        size: how many there are.
    """

    size: int

    def shapes(self, layer, length):
        lead = self.size, layer.num_heads
        return {
            "key": (*lead, layer.key_dim),
            "value": (*lead, layer.value_dim),
            "valid": (self.size,),
        }

    def attend(self, layer, cache, tokens, solve):
        tokens = _alone(tokens)
        mask, (batch, count) = tokens.key_mask, ops.shape(tokens.key)[:2]
        mask = ops.ones((batch, count), dtype="bool") if mask is None else mask
        new = {"key": tokens.key, "value": tokens.value, "valid": mask}
        after = {name: self._with(x, new[name], tokens.index, count) for name, x in cache.items()}
        if tokens.are_first:
            return *solve(tokens), after
        position = tokens.index - self.size + ops.arange(self.size, dtype="int32")
        before = {name: native.take(x, position % self.size, axis=1) for name, x in cache.items()}
        before["valid"] = ops.logical_and(before["valid"], position >= 0)
        key, value, mask = (
            ops.concatenate([cast(before[name], x.dtype), x], axis=1) for name, x in new.items()
        )
        # The first of them stands behind all that the ring holds.
        among_all = dataclasses.replace(tokens, key=key, value=value, key_masks=(mask,))
        return *solve(dataclasses.replace(among_all, index=self.size)), after

    def _with(self, x, new, index, count):
        """`x` with those of `new` that no later one is written over."""
        last = index + count - 1
        position = last - (last - ops.arange(self.size, dtype="int32")) % self.size
        new = take_along_time(new, ops.clip(position - index, 0, count - 1))
        is_new = ops.expand_dims(position >= index, axis=0)
        return ops.where(append_axes(is_new, len(x.shape) - 2), cast(new, x.dtype), x)


@dataclasses.dataclass(frozen=True)
class StateCache(Cache):
    """The state of a finite feature map."""

    def zeros(self, layer, batch_size, length, dtype):
        # Sums over many tokens, whatever keys and values are kept in.
        return super().zeros(layer, batch_size, length, accumulator(layer.compute_dtype))

    def shapes(self, layer, length):
        sizes = layer.num_heads, layer.key_dim, layer.value_dim
        return recurrence.state_shapes(*_feature_map(layer), *sizes)

    def attend(self, layer, cache, tokens, solve):
        tokens = _alone(tokens)
        # What another sequence left there is not of this one.
        goes_on = ops.cast(tokens.index, "int32") > 0
        cache = {
            name: ops.where(goes_on, x, nothing() if name == "log_scale" else 0.0)
            for name, x in cache.items()
        }
        output, after = recurrence.recurrent_attention(
            tokens.query,
            tokens.key,
            tokens.value,
            cache,
            *_feature_map(layer),
            tokens.key_mask,
        )
        output = layer._dropout_layer(output, training=tokens.training)
        return zero_where_masked(output, tokens.query_mask), None, after


def _feature_map(layer):
    """The feature map, and its weights."""
    return layer.primal.feature_map, layer._primal_weights.by_member[-1]


def _alone(tokens):
    """The tokens with masks of these keys alone.

    Raises:
        ValueError: unless a cache that does not keep all tokens serves the call.
    """
    if tokens.index is None or not tokens.is_causal or tokens.attention_mask is not None:
        raise ValueError(
            "A cache that does not keep all tokens needs `use_causal_mask=True` and a "
            "`cache_update_index`, and takes no `attention_mask`. Received: "
            f"use_causal_mask={tokens.is_causal}, cache_update_index={tokens.index}, "
            f"attention_mask={tokens.attention_mask}"
        )
    shape = ops.shape(tokens.key)[:2]
    for mask in tokens.key_masks:
        _check_room(tokens, mask.shape[1], "mask of keys")
    key_masks = tuple(
        mask
        if masks.fits(mask.shape, tokens.key.shape[:2], exactly=True)
        else ops.slice(mask, start_at(tokens.index, 1, 2), shape)
        for mask in tokens.key_masks
    )
    return dataclasses.replace(tokens, key_masks=key_masks)


class KeepsCaches:
    """Mixed into a layer whose caches keep their dtype.

    Keras casts all arguments to what a layer computes in: a state, a sum over many tokens, would
    lose what 16 bits do not hold.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._convert_input_args = False

    def __call__(self, *args, **kwargs):
        names = self.call_signature_parameters
        args = [self._converted(name, x) for name, x in zip(names, args)] + [*args[len(names) :]]
        kwargs = {name: self._converted(name, x) for name, x in kwargs.items()}
        return super().__call__(*args, **kwargs)

    def _converted(self, name, x):
        return x if name.endswith("cache") else keras.tree.map_structure(self._convert, x)

    def _convert(self, x):
        converted = self.dtype_policy.convert_input(x, self.autocast, self.input_dtype)
        if converted is not x:
            attach_mask(converted, get_keras_mask(x))
        return converted


def least(layer, length):
    """The cache that takes the least memory and time."""
    if _keeps_state(layer) and not layer._is_overridden():
        return StateCache()
    size = _window_size(layer)
    return by_position(layer) if size is None or size >= length else WindowCache(size)


def of_structure(layer, cache):
    """The one that `cache`, a tensor or a dict of tensors, is."""
    if isinstance(cache, dict) and "state" in cache and _keeps_state(layer):
        return StateCache()
    if isinstance(cache, dict) and "valid" in cache and _window_size(layer) is not None:
        return WindowCache(_window_size(layer))
    return by_position(layer)


def by_position(layer):
    """The cache of all keys and values of a layer."""
    steps = [transform.look_back for transform in layer.primal.transform]
    look_back = None if None in steps else sum(steps)
    return KeyValueCache(look_back, is_stacked=layer.key_dim == layer.value_dim)


def _keeps_state(layer):
    """Whether a sum over the keys so far is all that a query needs of them."""
    primal = layer.primal
    is_of_all_keys = type(primal.training_set) is AllKeys and layer._sliding_window is None
    return is_of_all_keys and primal.feature_map.has_states and not primal.transform


def _window_size(layer):
    """How many keys, the last ones, a query may see; `None` if any."""
    training_set, sizes = layer.primal.training_set, [layer._sliding_window]
    is_window = type(training_set) is SlidingWindow and not training_set.global_tokens
    if layer.primal.transform or not (is_window or type(training_set) is AllKeys):
        return None
    if is_window:
        sizes.append(training_set.size * training_set.dilation)
    return min((size for size in sizes if size is not None), default=None)


def checked(layer, cache, index, batch_size, return_scores):
    """The kind that `cache` is of, the cache and the index, once a call can have these arguments.

    Raises:
        ValueError: if it can't.
    """
    if isinstance(index, np.integer):
        index = int(index)
    kind = of_structure(layer, cache)
    if isinstance(index, int) and index == 0:
        cache = kind.complete(cache)
    kind.check(layer, cache, batch_size)
    is_integer = isinstance(index, int) and not isinstance(index, bool) and index >= 0
    if not (index is None or is_integer or _is_integer_scalar(index)):
        raise ValueError(
            "`cache_update_index` must be a non-negative integer or an integer scalar tensor. "
            f"Received: cache_update_index={index!r}"
        )
    if return_scores and shape_of_keys(cache) is None:
        raise ValueError(
            "A cache that does not keep all tokens can't tell their attention scores. "
            f"Received: return_attention_scores=True with cache of shape {_shapes(cache)}"
        )
    is_tensor = not (index is None or is_integer or keras.backend.is_keras_tensor(index))
    return kind, cache, ops.cast(index, "int32") if is_tensor else index


def _is_integer_scalar(x):
    if not hasattr(x, "dtype") or tuple(x.shape) != ():
        return False
    return keras.backend.is_int_dtype(keras.backend.standardize_dtype(x.dtype))


def shape_of_keys(cache):
    """`(batch, length)` of a cache of all positions; `None` for others."""
    if not isinstance(cache, dict):
        return cache.shape[0], cache.shape[2]
    is_by_position = "key" in cache and "valid" not in cache
    return tuple(cache["key"].shape[:2]) if is_by_position else None


def mask_of_keys(name, mask, value, cache):
    """A mask of the new keys, `(batch, n)`, or of all positions, `(batch, length)`, as boolean."""
    mask = masks.as_boolean(name, mask)
    batch, count = value.shape[:2]
    shapes = [(batch, count), shape_of_keys(cache) or (batch, None)]
    if not any(masks.fits(mask.shape, shape, exactly=True) for shape in shapes):
        raise ValueError(
            f"`{name}` must have a shape of {shapes}, that of the new tokens or the whole cache. "
            f"Received: {name} of shape {tuple(mask.shape)}"
        )
    return mask
