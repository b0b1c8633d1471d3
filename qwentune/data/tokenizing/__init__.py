"""The folder of a checkpoint and its tokenizer, proved before a row is read."""
