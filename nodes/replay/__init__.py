"""`fedmq replay`: run the nodes of a recorded run again and compare them with the record."""
