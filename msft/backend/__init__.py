"""The two engines behind one contract."""

# What each engine imports; `pip install 'msft[<engine>]'` brings it.
PACKAGES = {"torch": ("torch", "transformers", "peft"), "mindspore": ("mindspore",)}
