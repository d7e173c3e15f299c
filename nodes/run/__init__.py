"""One run: its configuration, the objects it is set up from, and the sessions of its nodes."""
