"""One HTML page from run folders and sweeps: it needs no network, and no server."""
