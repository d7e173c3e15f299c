"""The history of one run, read from its ledger: the single read model behind every view."""
