"""The two engines behind one contract."""
