"""Looking at a recorded run: `fedmq trace`."""
