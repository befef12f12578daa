"""Model families: what a Hugging Face config means, which tensors it has, and what MindFormers calls them."""
