"""Which weights of a model get a mask, and which part of each a rank holds."""
