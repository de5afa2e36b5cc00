"""A module becomes a graph, a graph and an image become one linear map: trace, pattern, operators, sweep."""
