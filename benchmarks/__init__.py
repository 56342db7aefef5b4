"""What the monitor costs, next to a plain forward and to other ways of getting attention: `make bench`."""
