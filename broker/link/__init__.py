"""A node's side of the wire: the Link core, its DEALER loop, and the link that programs use."""
