"""Recurrent sequence models in JAX, from the LSTM of 1997 to xLSTM, under one contract."""

__version__ = "0.1.0"
