"""Compiled programs: cached on disk, and compiled in the background while another form runs."""
