"""Masks and sparse models in files, ours and other people's."""
