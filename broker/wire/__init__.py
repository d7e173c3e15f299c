"""Messages as bytes: their schema, encoding, addresses, chunks and batches."""
