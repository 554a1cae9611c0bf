"""Compiled programs: kept on disk, and made in the background while an older form serves."""
