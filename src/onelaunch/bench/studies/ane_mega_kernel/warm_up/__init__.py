"""The experiment warm-up. Nothing is imported here: what its child process imports is measured."""
