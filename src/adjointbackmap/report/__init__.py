"""The results of the study as one page, which needs no network, server or other file."""
