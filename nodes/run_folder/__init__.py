"""The folder of a run: its files, its summary and the run's final model."""
