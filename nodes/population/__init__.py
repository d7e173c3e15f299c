"""The clients of a simulated run: how fast they are, and when they are available."""
