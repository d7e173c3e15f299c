"""The aggregator: its core, and the program that connects it to a broker."""
