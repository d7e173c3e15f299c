"""Running the nodes of a recorded run again: `fedmq replay`."""
