"""Head-to-head measurements against what a user would pick instead; one file a question, `run.py` runs them."""
