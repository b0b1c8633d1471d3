"""What a model answers, and what its answer is made of."""
