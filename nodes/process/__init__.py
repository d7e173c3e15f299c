"""What every process does with signals, output streams, logs and text for people."""
