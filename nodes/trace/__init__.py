"""`fedmq trace`: list, show, count, compare and export what a ledger recorded."""
