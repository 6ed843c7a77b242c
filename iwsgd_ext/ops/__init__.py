"""The fused operators, one file each: schema, shapes of fake tensors, autograd, and the form that layers call."""
