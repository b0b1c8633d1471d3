"""From a sample to token ids with loss weights."""
