"""Two engines side by side: the same recipe, the same data, the same weights, and the first place where they differ."""
