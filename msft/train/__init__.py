"""Training runs, engine-neutral: schedules, the loop, metrics, checkpoints, and what a run leaves behind."""
