"""Layers that draw noise, and the context that gives them the number of noise samples and their address."""
