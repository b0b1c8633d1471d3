"""Weights, adapters and the loss head."""
