"""How attention and feed-forward layers are laid out over devices."""

import keras


def layout_map(device_mesh, prefix=".*", axis="model"):
    r"""Returns a layout that divides heads and feed-forward networks among devices.

    Every device of `axis` holds some of the heads, \(1/n\) of the queries', keys' and values'
    kernels and of the output's, and as many of the hidden units: one sum over the devices after
    attention and one after the network is all they exchange. What a primal problem has
    besides, which is little, every device has.

    Masking, causality and numbers are those of one device.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        prefix: regular expression that paths of the layers meant begin with; all by default.
        axis: the axis of the mesh to divide over; the numbers of heads and hidden units
            must be multiples of its size.

    Returns:
        A `keras.distribution.LayoutMap` for `keras.distribution.ModelParallel`.

    Raises:
        ValueError: if the mesh has no such axis.

    Example:

    ```python
    import keras
    import keras_pdattn

    devices = [f"gpu:{index}" for index in range(4)]
    mesh = keras.distribution.DeviceMesh((1, 4), ("batch", "model"), devices)
    layouts = keras_pdattn.distribution.layout_map(mesh)
    distribution = keras.distribution.ModelParallel(layout_map=layouts)
    # keras.distribution.set_distribution(distribution), and then make the model.
    ```

    Reference:
        Shoeybi et al., "Megatron-LM", 2019 (arXiv:1909.08053), section 3; for the primal
        problems Nguyen et al., ICLR 2023 (arXiv:2406.13781).
    """
    if axis not in device_mesh.axis_names:
        raise ValueError(
            f"`axis` must be one of the mesh's, {device_mesh.axis_names}. Received: axis={axis!r}"
        )
    layouts = keras.distribution.LayoutMap(device_mesh)
    layers = f"{prefix}(/.*)?"
    layouts[f"{layers}/(query|key|value|gate)/kernel"] = (None, axis, None)
    layouts[f"{layers}/(query|key|value|gate)/bias"] = (axis, None)
    layouts[f"{layers}/attention_output/kernel"] = (axis, None, None)
    layouts[f"{layers}/feedforward_intermediate_dense/kernel"] = (None, axis)
    layouts[f"{layers}/feedforward_intermediate_dense/bias"] = (axis,)
    layouts[f"{layers}/feedforward_output_dense/kernel"] = (axis, None)
    return layouts
