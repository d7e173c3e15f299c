"""The folder of a run: its configuration, summary and final model."""
