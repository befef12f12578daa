"""From prompts to answers, for `msft generate` and `run_mode: predict`."""
