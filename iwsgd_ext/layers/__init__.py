"""Layers that draw noise, and the context that tells them how many noise samples of which address."""
