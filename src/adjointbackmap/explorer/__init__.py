"""The explorer: a page in the browser that shows the hyperplane of any unit, and its receipt."""
