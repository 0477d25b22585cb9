"""From class scores to an answer one can trust: how sure, whether at all, and which names remain.

Pure functions over logits [n, C] and labels [n]; they compute in float64 and know of no run.
"""
