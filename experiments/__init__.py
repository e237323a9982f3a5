"""What a researcher runs: today the demo; measurements and ablations come later."""
