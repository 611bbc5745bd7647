"""Results as a page, as figures, and as text for the terminal. Nothing here imports torch or reads a clock."""
