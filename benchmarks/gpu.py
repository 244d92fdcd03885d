"""What is measured on a GPU: which kernels run, and times against Keras's layer.

KERAS_BACKEND=torch python -m benchmarks.gpu
"""

import sys

from benchmarks import kernels, machine, speed

LENGTHS = "1024", "4096", "16384"


def main():
    gpu = machine.gpu()
    if gpu is None:
        sys.exit("Expected a backend that runs on a GPU. Received: none")
    # Times of two cards are two files: "NVIDIA H100 80GB HBM3" is `h100` in their names.
    card = gpu.removeprefix("NVIDIA ").split()[0].lower()
    kernels.main()
    speed.main(
        ["--name", f"speed_gpu_{card}", "--against", "Keras"]
        + ["--members", *kernels.MEMBERS, "--dtypes", "bfloat16", "float32", "--lengths", *LENGTHS]
    )


if __name__ == "__main__":
    main()
