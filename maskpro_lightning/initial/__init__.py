"""Masks to start from, found without learning."""
