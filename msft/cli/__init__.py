"""The command line: one file per sub-command, each a parser and a call."""
