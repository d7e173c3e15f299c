"""The keys of this user's nodes: where they are, and which of them a node uses."""
