"""Watch a step from below autograd: ops, values, storages, module calls."""
