"""What results say: a page, figures, and text for the terminal. Nothing here imports torch or reads a clock."""
