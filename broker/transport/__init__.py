"""Sockets with keys: who is at the other end of a connection, and whom the broker lets in."""
