"""From a graph to a network, and from an image to one linear map: pattern, operators, sweep."""
