"""What every question needs: processes and their memory, repeats, verdicts, tables, files, pictures."""
