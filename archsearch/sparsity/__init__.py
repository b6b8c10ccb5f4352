"""Single weights instead of channels: masks, what decides them, and training under them."""
