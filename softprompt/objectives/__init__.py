"""Every loss and reward as a pure function of tensors, a module for each method.

Docstrings give the equation and its source: the method's own code where that was read, otherwise its paper. What could not be
verified in a source is marked so.
"""
