"""What every room uses: arguments that are checked, files, progress."""
