"""From raw files to batches: formats, conversations, templates, tokens, MindRecord, batches."""
