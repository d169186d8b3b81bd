"""Fused operators of a Llama-style transformer. They depend on torch and, for the kernels, on Triton alone."""
