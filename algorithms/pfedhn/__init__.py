"""pFedHN: personal models from a hypernetwork."""
