"""Fine-tuning for the Qwen model family that proves its memory, its training signal and its resume."""

__version__ = "0.1.0"
