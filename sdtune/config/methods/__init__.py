"""One config class per method, each in a file of its own, so that a command builds its own class alone."""
