"""Pages for a browser: what is trained, and how a run goes."""
