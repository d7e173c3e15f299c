"""A run on one host: broker and nodes as processes under one supervisor."""
