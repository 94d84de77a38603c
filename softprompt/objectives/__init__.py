"""The literature's objectives beside the denoising loss: pure functions of tensors, a module for each method.

Docstrings give the equation and where it is from: the method's own code where that was read, or its paper. What could not be
verified in a source is marked so.
"""
