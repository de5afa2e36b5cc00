"""From the linear map to hyperplanes: the query, the ways to compute it, the planner, results in memory and on disk."""
