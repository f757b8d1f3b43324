"""Triton kernels of the operations in the folder above, one a file, with launchers of the same signatures.

Importing a module of this package needs triton. Without a GPU, kernels run on CPU tensors under triton's interpreter
(TRITON_INTERPRET=1 before the first import). Sizes of tiles are pure functions of shapes and of the card; those that
decide the order of a sum never depend on how many rows a matrix has, so that a matrix may come in parts.
"""
