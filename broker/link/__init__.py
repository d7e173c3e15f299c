"""A node's connection to its broker: the Link core, its DEALER loop, and `NodeLink`."""
