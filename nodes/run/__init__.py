"""One run: its configuration, the objects that it names, and the sessions of its nodes."""
