"""The line about an unknown name."""

from xlstm_jax.names import unknown


def test_the_nearest_names_or_all():
    assert unknown("cell", "lsmt", ["gru", "lstm", "slstm"]) == "unknown cell 'lsmt'; nearest: lstm, slstm"
    assert unknown("cell", "rwkv", ["gru", "lstm"]) == "unknown cell 'rwkv'; valid: gru, lstm"
