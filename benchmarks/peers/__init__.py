"""The other toolkits: their environments, and the scripts that run inside them (which import nothing from here)."""
