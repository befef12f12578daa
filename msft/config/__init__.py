"""The recipe: YAML in MindFormers' layout, overrides from the command line, and what follows from them."""
