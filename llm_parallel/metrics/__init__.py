"""What a run measures about itself, where it is written, and how it is drawn."""
