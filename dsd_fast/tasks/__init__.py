"""One step of work each: what a kind of run draws, optimises and writes at the end."""
