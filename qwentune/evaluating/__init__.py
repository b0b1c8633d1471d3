"""What a model is worth on rows: questions from rendered examples, what it makes of each, and scores with intervals."""
