"""What goes in and out of a node's core: events, actions, payloads."""
