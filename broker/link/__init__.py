"""A node's connection to its broker: the Link core, its driver `NodeLink`, and the live port."""
