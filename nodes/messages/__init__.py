"""Input and output of a node's core: events, actions, payloads."""
