"""Pure functions of tensors: advantages and losses."""
