"""The append-only ledger of what a broker accepted: writing, reading, retention."""
