"""Training: one plain loop, whose behaviour comes in as callbacks, that can be killed and goes on."""
