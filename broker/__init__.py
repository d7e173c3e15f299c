"""Messaging: wire format, ledger, broker and links. Never imports torch."""
