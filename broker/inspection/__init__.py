"""Read a ledger from its files alone: as a trace, to check it, and to repair it."""
