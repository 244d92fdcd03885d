"""Trains one model on one device and on several, and compares the losses.

On JAX over 8 devices, as copies that share a batch and divided by heads; on TensorFlow with a
`MirroredStrategy` over 2; on PyTorch with `DistributedDataParallel` in 2 processes. Devices are
parts of this machine's processor, so nothing gets faster here: the code is what you take to
several machines, the losses show that it computes the same.

    KERAS_BACKEND=jax python examples/distributed.py
    PRIMAL=scaled_head KERAS_BACKEND=torch python examples/distributed.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import keras_pdattn

BACKEND = keras.backend.backend()
NUM_DEVICES = {"jax": 8, "tensorflow": 2, "torch": 2}[BACKEND]
PRIMAL = os.environ.get("PRIMAL", "batch_norm")
BATCH, STEPS, RATE = 64, 6, 0.05
TOLERANCE = 1e-4


def data():
    """Digits of 8 rows with 8 pixels, as many as there are steps for."""
    images, labels = load_digits(return_X_y=True)
    count = BATCH * STEPS
    return images[:count].reshape(-1, 8, 8).astype("float32") / 16, labels[:count]


def make_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8))
    x = keras.layers.Dense(32, name="embedding")(inputs)
    x = keras_pdattn.layers.TransformerEncoder(64, num_heads=8, primal=PRIMAL, name="block")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="classes")(x))


def losses_of(model):
    """The loss after each step of one pass over the data."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE), loss)
    images, labels = data()
    found = []
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        history = model.fit(images[part], labels[part], batch_size=BATCH, shuffle=False, verbose=0)
        found += history.history["loss"]
    return found


@contextlib.contextmanager
def distributed(distribution):
    keras.distribution.set_distribution(distribution)
    yield
    keras.distribution.set_distribution(None)


def on_jax():
    devices = keras.distribution.list_devices()
    assert len(devices) == NUM_DEVICES
    found = {"one device": losses_of(make_model())}
    with distributed(keras.distribution.DataParallel(devices=devices)):
        model = make_model()
        found["data parallel"] = losses_of(model)
        assert [shard.data.shape for shard in shards_of(model)] == NUM_DEVICES * [(32, 8, 4)]
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layouts = keras_pdattn.distribution.layout_map(mesh)
    with distributed(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")):
        model = make_model()
        found["model parallel"] = losses_of(model)
        # A quarter of the 8 heads on each device.
        assert [shard.data.shape for shard in shards_of(model)] == NUM_DEVICES * [(32, 2, 4)]
    return found


def shards_of(model):
    """What each device holds of the kernel of the queries."""
    attention = model.get_layer("block")._self_attention_layer
    return attention.query_dense.kernel.value.addressable_shards


def on_tensorflow():
    import tensorflow as tf

    (processor,) = tf.config.list_physical_devices("CPU")
    parts = NUM_DEVICES * [tf.config.LogicalDeviceConfiguration()]
    tf.config.set_logical_device_configuration(processor, parts)
    found = {"one device": losses_of(make_model())}
    strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(len(parts))])
    assert strategy.num_replicas_in_sync == len(parts)
    with strategy.scope():
        found["mirrored"] = losses_of(make_model())
    return found


def train_with_torch(rank, num_processes, folder):
    """One process of several, each with its part of every batch."""
    import torch
    from torch import distributed, nn

    model = make_model()
    trained = model
    if num_processes > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_processes
        )
        trained = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    images, labels = (torch.as_tensor(x) for x in data())
    found = []
    for start in range(0, len(labels), BATCH):
        size = BATCH // num_processes
        part = slice(start + rank * size, start + (rank + 1) * size)
        loss = nn.functional.cross_entropy(trained(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if num_processes > 1:
            distributed.all_reduce(loss)
        found.append(float(loss) / num_processes)
    if num_processes > 1:
        # The wrapper must not outlive the group: it would end the group's threads while it holds
        # Python's lock, for which one of them may be waiting.
        del trained
        distributed.destroy_process_group()
    if rank == 0:
        np.save(Path(folder) / f"{num_processes}.npy", found)


def on_torch():
    import torch

    counts = {"one process": 1, "data parallel": NUM_DEVICES}
    with tempfile.TemporaryDirectory() as folder:
        train_with_torch(0, 1, folder)
        arguments = NUM_DEVICES, folder
        torch.multiprocessing.spawn(train_with_torch, arguments, nprocs=NUM_DEVICES)
        return {name: np.load(Path(folder) / f"{n}.npy").tolist() for name, n in counts.items()}


def main():
    warnings.simplefilter("ignore")
    found = {"jax": on_jax, "tensorflow": on_tensorflow, "torch": on_torch}[BACKEND]()
    table = Table(title=f"Loss on {BACKEND}, {PRIMAL}")
    table.add_column("step")
    for name in found:
        table.add_column(name, justify="right")
    for step, row in enumerate(zip(*found.values())):
        table.add_row(str(step), *(f"{loss:.6f}" for loss in row))
    Console(width=100).print(table)
    alone, *others = np.array(list(found.values()))
    difference = max(np.abs(other - alone).max() for other in others)
    print(f"largest difference {difference:.1e}, losses {alone[0]:.3f} to {alone[-1]:.3f}")
    sys.exit(0 if difference < TOLERANCE and alone[-1] < alone[0] else 1)


if __name__ == "__main__":
    main()
