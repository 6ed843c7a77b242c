"""Throughput of the library beside the naive loop, its peers and the machine's limits: ``python -m bench --help``."""
