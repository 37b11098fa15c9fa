"""Scripts: thin command lines over `xlstm_jax` and `configs`."""
