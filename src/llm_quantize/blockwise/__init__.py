"""Quantizing with calibration: block after block, each matrix against the inputs that it will really be given.

``options`` (no torch) · ``start`` the door · ``run`` the way through the blocks · ``places`` which rows a matrix has,
and where they go back · ``inputs`` what the matrices of a block are given · ``gram`` sums of products · ``solve`` the
matrices of a stage · ``scaling`` a block rescaled · ``stores`` what a format makes of codes · ``memory`` what it takes.
"""
