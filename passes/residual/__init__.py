"""Residual blocks by graph structure: which additions join a skip path with a body that forked off it.

``search`` is the way in. No class name, module name or architecture is looked at: everything follows from the flow of
activations in the captured graph. The files, in the order in which the search uses them:

* ``operators``: what kind of operation a node is (linear, weighted layer, resizing, ...).
* ``shapes``: shapes with a symbolic batch, compared without adding guards.
* ``activation_dag``: the flow of values that depend on the input.
* ``dominators``: where the operands of an addition split.
* ``add_tree``: ``x + attention(h) + mlp(h)`` is one join, not two.
* ``body``: the single-exit region behind a join, and what it reads from outside.
* ``shortcut``: what an operand does between fork and join.
* ``rules``: the reasons why an addition is no residual block, or is one that no gate should skip.
* ``describe``: the name of a block and the dimension of its features.
* ``overrides``: the blocks that the user adds or removes.
"""

from e2pass.passes.residual.search import search

__all__ = ["search"]
