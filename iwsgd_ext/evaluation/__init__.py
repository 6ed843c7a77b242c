"""Predictions and bounds of trained models over noise samples, and pictures of them."""
