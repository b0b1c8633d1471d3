"""Facts: one row per Qwen checkpoint and one per GPU, each with the source of its numbers."""
