"""Self-supervised training; nothing here imports torch before it is used, so that planning stays fast."""
