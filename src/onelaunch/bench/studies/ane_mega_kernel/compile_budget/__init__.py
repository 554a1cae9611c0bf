"""The experiment compile-budget. Nothing is imported here: its child processes time imports."""
