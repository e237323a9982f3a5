"""The parts of the model, one file each."""
