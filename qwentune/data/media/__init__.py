"""Pictures, videos and sounds: what a model is given of them, read from their files."""
