"""The mathematics of N:M masks: patterns, their distribution, and counter-based random numbers."""
