"""The experiment cache. Nothing is imported here: what its child process imports is measured."""
