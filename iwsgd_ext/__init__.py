"""Importance weighted SGD for PyTorch: S noise samples per training example, through fused kernels."""
