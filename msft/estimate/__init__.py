"""What a run will need and how long it will take, from its recipe alone: no framework, no device, no data."""
