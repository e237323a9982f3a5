"""Many requests at a time: what a step runs, blocks, the loop."""
