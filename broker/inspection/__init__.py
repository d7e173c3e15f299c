"""A ledger read from its files alone: as a trace, for damage, and its repair."""
