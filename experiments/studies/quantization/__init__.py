"""What quantising the shipped demo model costs, layer by layer and as a whole."""
