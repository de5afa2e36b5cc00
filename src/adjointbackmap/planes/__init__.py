"""From the linear map to hyperplanes.

The query, the methods that compute it, the planner, and results in memory and on disk.
"""
