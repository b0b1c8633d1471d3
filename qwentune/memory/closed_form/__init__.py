"""Bytes and seconds of a run as pure functions of the model's dimensions and the settings."""
