"""Losses over noise samples, the ways to run their backward pass, and what to log of them."""
