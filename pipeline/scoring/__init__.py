"""Scores of text under a model, and the choice of samples by them."""
