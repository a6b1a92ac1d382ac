"""Private members of PyTorch and DeepSpeed: one module for each framework, and no use elsewhere.

Every member is listed with the versions that it was seen in, and looked for before it is used. A
version that lacks one is refused by name (:class:`~sharded_ema.errors.FrameworkVersionError`).
"""
