"""From a finished run to a folder that others load: package, merge, verify."""
