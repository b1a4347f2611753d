"""Pruning a model, decoder layer by decoder layer."""
