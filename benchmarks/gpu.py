"""What is measured on a GPU: which kernels run, and times against Keras's layer.

Arguments are those of `benchmarks.speed`: of the times these alone are measured then, and take the
place of what they were. JAX may compile for minutes, more than a GPU is at hand for.

    KERAS_BACKEND=torch python -m benchmarks.gpu
    KERAS_BACKEND=jax python -m benchmarks.gpu --dtypes float32 --lengths 4096
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
    asked = sys.argv[1:]
    if not asked:
        kernels.main()
    speed.main(
        ["--name", f"speed_gpu_{card}", "--add", "--against", "Keras"]
        + ["--members", *kernels.MEMBERS, "--dtypes", "bfloat16", "float32", "--lengths", *LENGTHS]
        + asked
    )


if __name__ == "__main__":
    main()
