"""Whether the layers run the fused kernels of a GPU: asserted, by what ran or was compiled.

KERAS_BACKEND=torch python -m benchmarks.kernels
"""

import re

import keras
from rich.console import Console

from benchmarks import machine, results
from benchmarks.cases import CASES, call_of, inputs
from benchmarks.compiled import forward_of

MEMBERS = ("softmax", "Attention-BN", "Attention-SH")
LENGTH = 1024


def kernels_on_torch(layer, x, call):
    """The attention operations that ran."""
    from torch.profiler import ProfilerActivity, profile

    forward = forward_of(layer, **call)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        forward(x)
    names = {event.key for event in profiler.key_averages()}
    return sorted(name for name in names if "_scaled_dot_product_" in name)


def kernels_on_jax(layer, x, call):
    """The attention kernels of cuDNN in the compiled program."""
    text = forward_of(layer, **call).lower(x).compile().as_text()
    return sorted(set(re.findall(r"__cudnn\$fmha\w*", text)))


def main():
    if machine.gpu() is None:
        raise SystemExit("There is no GPU here.")
    is_torch = keras.backend.backend() == "torch"
    kernels = kernels_on_torch if is_torch else kernels_on_jax
    rows = []
    for name in MEMBERS:
        # JAX has a kernel for 16 bits only.
        for dtype in ("bfloat16", "float32") if is_torch else ("bfloat16",):
            for mode in ("whole", "causal"):
                layer, x = CASES[name].ours(dtype), inputs(LENGTH, dtype)
                layer.build(x.shape, x.shape)
                ran = kernels(layer, x, call_of(mode, LENGTH))
                if not ran or any("math" in kernel for kernel in ran):
                    raise AssertionError(f"{name}, {mode}, {dtype} ran {ran or 'no kernel'}.")
                rows.append({"member": name, "mode": mode, "dtype": dtype, "kernels": ran})
                Console().print(name, mode, dtype, *ran)
    results.write("kernels_gpu", {"rows": rows})


if __name__ == "__main__":
    main()
