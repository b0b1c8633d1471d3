"""Configurations of other fine-tuning tools: what their keys are called here, and recipes from them."""
