"""The wire format: schema, encoding, addresses, chunks, batches and sockets."""
