"""A network in memory with a virtual clock and seeded faults, for the same cores."""
