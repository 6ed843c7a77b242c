"""Triton forms of the ops, one module each under the op's name; imported by ``backend`` on first use, which calls its OPS.

philox               the generator and the mask rule, for all noise kernels
iw_cross_entropy     the loss: launches; its kernels and its plans stand beside it
noise                dropout noise and its gradient
device               what a plan may know of a device
"""
