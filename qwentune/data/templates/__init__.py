"""The checkpoint's own chat template: run within bounds, and what it is seen to do."""
