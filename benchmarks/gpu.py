"""What is measured on a GPU: which kernels run, and times against Keras's layer.

KERAS_BACKEND=torch python -m benchmarks.gpu
"""

from benchmarks import kernels, speed

LENGTHS = "1024", "4096", "16384"

if __name__ == "__main__":
    kernels.main()
    speed.main(
        ["--name", "speed_gpu", "--against", "Keras"]
        + ["--members", *kernels.MEMBERS, "--dtypes", "bfloat16", "float32", "--lengths", *LENGTHS]
    )
