"""Packed spacetime attention and fused adaLN kernels, each beside its PyTorch reference."""
