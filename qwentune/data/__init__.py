"""From a row of a file to a batch: one file per stage, in the order of the walk."""
