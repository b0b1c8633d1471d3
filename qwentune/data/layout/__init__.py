"""From examples to rows and batches: stored, split, packed, put in order."""
