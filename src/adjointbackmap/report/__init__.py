"""One self-contained page from the results of the study: no network, no server, no other file is needed to read it."""
