"""Throughput of the kernels beside their limits and their peers: ``python -m bench``."""
