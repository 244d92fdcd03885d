"""Values described by a config: what feature maps, transforms, training sets and primals share."""

import dataclasses
import inspect
import json

import keras

PACKAGE = "keras_pdattn"


class Description:
    """An immutable value that its config describes, as Keras describes initialisers.

    Equality, hash, `repr` and the JSON round trip all follow from
    `get_config()`. A frozen dataclass gets `get_config()` from its fields; any
    other subclass writes its own, the inverse of its constructor.
    """

    def get_config(self):
        """Returns the JSON-serialisable constructor arguments."""
        if not dataclasses.is_dataclass(self):
            return {}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_config(cls, config):
        """Builds the description that `get_config()` wrote down."""
        known = inspect.signature(cls).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())
        unknown = [name for name in config if name not in known]
        if unknown and not takes_any:
            raise ValueError(
                f"The config of {cls.__name__} may hold {', '.join(known) or 'nothing'}; a newer "
                f"version of the package may have written more. Received: {', '.join(unknown)}"
            )
        return cls(**config)

    def __eq__(self, other):
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash((type(self), json.dumps(self.get_config(), sort_keys=True)))

    def __repr__(self):
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class Member(Description):
    """A feature map, transform or training set: one of the choices of a primal problem."""

    #: Whether it may be used in a causal call. One that sets this to False is refused there.
    supports_causal = True


class WeightedMember(Member):
    """A member that each layer may keep weights of its own for."""

    def build(self, add_weight, num_heads, depth):
        """Creates the weights of one layer.

        Args:
            add_weight: function with the arguments of `keras.layers.Layer.add_weight`.
            num_heads: number of heads.
            depth: depth of a key.

        Returns:
            Dict from a name to a weight: a scalar, or of shape
            `(..., num_heads, depth)`.
        """
        return {}

    def multiply_adds(self, num_queries, examples, depth):
        """Multiply-adds of one head, beside work that grows with the size of its tensors only.

        Args:
            num_queries: the number of queries.
            examples: `ops.examples.Examples`, of which the shapes count.
            depth: depth of queries and keys.
        """
        return 0

    def initial_weights(self, num_heads, depth):
        """What `build` would start from, as plain tensors."""

        def initial_value(shape=None, initializer=None, dtype=None, *args, **kwargs):
            # With the defaults of `keras.layers.Layer.add_weight`.
            dtype = keras.backend.standardize_dtype(dtype)
            if initializer is None:
                is_float = keras.backend.is_float_dtype(dtype)
                initializer = "glorot_uniform" if is_float else "zeros"
            return keras.initializers.get(initializer)(shape or (), dtype=dtype)

        return self.build(initial_value, num_heads, depth)


def serialize(description):
    """Writes `description` as a config that `get()` and Keras read back.

    Raises:
        ValueError: if its class is not registered with Keras, since a file
            holding it could not be loaded.
    """
    cls = type(description)
    if keras.saving.get_registered_name(cls) == cls.__name__:
        raise ValueError(
            f"{cls.__name__} can't be written to a config because Keras does not know it. "
            "Decorate the class with `@keras.saving.register_keras_serializable("
            f'package="my_package")`. Received: {description!r}'
        )
    return keras.saving.serialize_keras_object(description)


class Registry:
    """The built-in members of one kind by name, and the way from an identifier to a member.

    Args:
        kind: what a member is called in messages, e.g. `"feature map"`.
        base: the class every member is an instance of.
        members: dict from a name to the member with its default arguments.
    """

    def __init__(self, kind, base, members):
        self.kind = kind
        self.base = base
        self.members = members

    def get(self, identifier):
        """Returns the member that `identifier` names, describes or is."""
        if isinstance(identifier, self.base):
            return identifier
        if isinstance(identifier, type) and issubclass(identifier, self.base):
            return identifier()
        if isinstance(identifier, str):
            return self._by_name(identifier)
        if isinstance(identifier, dict) and "class_name" in identifier:
            return self._by_config(identifier)
        raise ValueError(
            f"A {self.kind} is given as a name ({self._names()}), a config dict or an instance of "
            f"`{self.base.__module__}.{self.base.__name__}`. "
            f"Received: {identifier!r}"
        )

    def _by_name(self, name):
        if name in self.members:
            return self.members[name]
        registered = keras.saving.get_registered_object(name)
        if registered is not None:
            return self.get(registered)
        raise ValueError(
            f"Unknown {self.kind}. Expected one of {self._names()}, or the registered name of a "
            f"class of yours. Received: {name!r}"
        )

    def _by_config(self, config):
        classes = {type(member).__name__: type(member) for member in self.members.values()}
        if "registered_name" not in config and config["class_name"] in classes:
            return classes[config["class_name"]].from_config(config.get("config", {}))
        return self.get(keras.saving.deserialize_keras_object(config))

    def _names(self):
        return ", ".join(repr(name) for name in self.members)
