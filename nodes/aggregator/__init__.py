"""The aggregator: its core, its driver, and the program that connects it to a broker."""
