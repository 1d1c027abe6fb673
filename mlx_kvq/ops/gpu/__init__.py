"""The GPU backend: Metal kernels, or the same sources on CUDA."""
