"""Chooses the weights of a model that get a mask, and finds the part of each that a rank holds."""
