"""The append-only record of all that a broker accepted: written, read by number, retained."""
