"""What the project measures about itself: one module, or folder, a question."""
