"""The commands of a researcher: where a step's time goes, what one change is worth, how two models differ."""
