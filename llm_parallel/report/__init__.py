"""Makes one HTML page from run folders and sweeps; the page needs neither network nor server."""
