"""What every experiment shares: runner, records, rounds, times, verdicts, tables, pictures."""
