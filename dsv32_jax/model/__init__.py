"""The paper: one step of the model, one file a part; read `model.py` first."""
