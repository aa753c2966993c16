"""What is learnt.

Low-rank updates, their variants and initial values, and the adapter that names them.
"""
