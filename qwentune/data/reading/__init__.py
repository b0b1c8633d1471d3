"""From a file to values: rows as a stream, each with the place it stands at."""
