"""Logs, writes and draws the numbers of a run."""
