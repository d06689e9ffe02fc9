"""How fast training is on this machine, and how fast loops written by hand are beside it."""
