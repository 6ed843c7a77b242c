"""Losses over noise samples, strategies for their backward pass, and a logger of their statistics."""
