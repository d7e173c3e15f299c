"""Messages move: wire format, ledger, routing, links. Never imports torch."""
