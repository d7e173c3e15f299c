"""The virtual world: network, disk, clocks and processes, with seeded faults."""
