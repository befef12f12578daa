"""Streaming weight conversion and the file codecs it needs; works without any framework installed."""
