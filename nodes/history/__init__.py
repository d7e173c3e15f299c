"""The history of one run, read from its ledger: the one model under every view of a run."""
