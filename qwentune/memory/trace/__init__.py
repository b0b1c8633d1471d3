"""The real training step on meta tensors, and what torch's allocator makes of it."""
